"""The decisions of a sweep, played again: does each follow from the numbers it states, and are these the ledger's?

Halving, HyperBand and searches by a model are played from their records alone (`transfer.search`). ASHA's are Ray's own to play:
`orchestration.tune.asha.replay_asha`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.storage import objects
from transfer.search import optuna_search, successive_halving
from transfer.sweep.entry import LedgerEntry


@dataclass(frozen=True)
class Played:
    num: int
    """Decisions that were played."""
    wrong: tuple[str, ...] = ()
    """A sentence for each that does not hold."""
    not_played: tuple[str, ...] = ()
    """Why others were not, in sentences."""


def play_again(sweep: str, entries: Mapping[str, LedgerEntry], methods: Mapping[str, Any], cell: str = "") -> Played:
    """All decisions of the sweep folder, or of one of its cells.

    Args:
        entries: the ledger's, by digest.
        methods: name -> settings, as the sweep's plan states them.
    """
    num, wrong, not_played, asked_by = 0, [], [], set()
    chain = functools.cache(lambda cell: optuna_search.written(sweep, cell))
    for url in objects.list_urls(objects.join(sweep, "decisions"), ".json"):
        name = url.rpartition("/")[2].removesuffix(".json")
        if name.endswith("-asha") or (cell and not name.startswith(f"{cell}-")):
            continue
        if re.search(r"-generation-\d+$", name):
            generation = optuna_search.read_generation(url)
            assert generation is not None
            if generation.library != optuna_search.library():
                asked_by.add(generation.library)
                continue
            problem = _of_generation(generation, chain(generation.cell)[: generation.number], entries, methods)
        else:
            decision = successive_halving.read_decision(url)
            assert decision is not None
            problem = _of_rung(decision, entries)
        num += 1
        if problem:
            wrong.append(f"the decision {name} does not hold: {problem}")
    for library in sorted(asked_by):
        not_played.append(f"what {library} asked for is not played again by {optuna_search.library()}")
    return Played(num, tuple(wrong), tuple(not_played))


def _of_rung(decision: successive_halving.Decision, entries: Mapping[str, LedgerEntry]) -> str:
    if successive_halving.replay(decision) != decision.kept:
        return "others go on by its own numbers"
    for row in decision.rows:
        entry = entries.get(row["digest"])
        stood = [r["accuracy"] for r in (entry.history if entry else []) if r["step"] == decision.step]
        if stood and row["score"] is not None and row["score"] != stood[0]:
            return f"candidate {row['index']} stood at {stood[0]:g}, and it says {row['score']:g}"
    return ""


def _of_generation(
    generation: optuna_search.Generation,
    earlier: Sequence[optuna_search.Generation],
    entries: Mapping[str, LedgerEntry],
    methods: Mapping[str, Any],
) -> str:
    if [row["hyperparameters"] for row in generation.rows] != [point for one in earlier for point in one.points]:
        return "what it follows from is not what was asked before"
    for row in generation.rows:
        entry = entries.get(row["digest"])
        if entry is None:
            continue
        if row["score"] != (entry.value if entry.is_ok else None):
            return f"trial {row['digest'][:12]} has {entry.value} in the ledger, and it says {row['score']}"
        configured = (methods.get(entry.method) or {}).get("search", generation.search)
        if configured != generation.search:
            return "the suite states another search"
    if optuna_search.replay(generation) != generation.points:
        return "other points are asked for by its own numbers"
    return ""
