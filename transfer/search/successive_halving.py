"""What candidates had reached at a rung, and who went on: written down, so that a decision is taken once and can be played again.

<sweep>/rungs/<trial>-<step>.json                where a candidate stood, written by the worker that brought it there
<sweep>/decisions/<cell>-<bracket>-<step>.json   who went on, and from which numbers that follows
<sweep>/decisions/<cell>-asha.json               under ASHA: all that it was told, in order, and its verdicts
<sweep>/work/<trial>/                            the loop's own run folder of a trial that is under way
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from pipeline import documents
from pipeline.documents import Count, Text
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.search.grids import survivors

REMEDY = "restore it, or run the sweep again in another folder: a decision is not taken twice"


class Row(TypedDict):
    """Of a candidate in a decision."""

    index: Count
    digest: Text
    score: float | None
    loss: float | None


class AshaEvent(TypedDict):
    """What ASHA was told, and what it said."""

    trial: dict[str, Any]
    step: Count
    accuracy: float
    verdict: str
    time_s: float


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A candidate at a rung."""

    digest: str
    """Of the trial."""
    step: int
    score: float
    """The protocol's metric on the held-out part."""
    loss: float
    rows: list[dict[str, float]]
    """Its history so far."""
    seconds_s: float
    """In all its segments."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Who goes on from a rung."""

    cell: str
    bracket: int
    step: int
    scheduler: str
    rows: list[Row]
    """Of each candidate that had come so far; null where it had failed."""
    kept: list[Count]
    """Their indices."""
    time_s: float = field(default_factory=time.time)


def rung_url(sweep: str, digest: str, step: int) -> str:
    return objects.join(sweep, "rungs", f"{digest}-{step}.json")


def write_rung(sweep: str, rung: Rung) -> None:
    objects.write_bytes(rung_url(sweep, rung.digest, rung.step), (json.dumps(asdict(rung)) + "\n").encode())


def read_rung(sweep: str, digest: str, step: int) -> Rung | None:
    """None where it has not got there. UserError where its record is damaged, or another candidate's."""
    url = rung_url(sweep, digest, step)
    try:
        found = documents.read(url, Rung, remedy="delete this file, its trial runs to there again")
    except FileNotFoundError:
        return None
    if (found.digest, found.step) != (digest, step):
        raise UserError(f"{url} says step {found.step} of trial {found.digest[:12]}; delete this file")
    return found


def decide(
    sweep: str,
    cell: str,
    number: int,
    step: int,
    scheduler: str,
    alive: dict[int, tuple[str, Rung | None]],
) -> Decision:
    """The decision of a rung: the one that is written, or else a new one, written before anybody acts on it.

    Args:
        alive: index of each candidate that had come so far -> (digest, where it stands; None if it failed).
    """
    url = decision_url(sweep, cell, number, step)
    there = read_decision(url)
    if there is not None:
        if [(row["index"], row["digest"]) for row in there.rows] != [(i, digest) for i, (digest, _) in alive.items()]:
            raise UserError(f"{url} was taken about other candidates than this sweep has at step {step}; {REMEDY}")
        if replay(there) != there.kept:
            raise UserError(f"{url}: by its own numbers others go on than it keeps; {REMEDY}")
        return there
    rows: list[Row] = [
        {"index": i, "digest": digest, "score": rung.score if rung else None, "loss": rung.loss if rung else None}
        for i, (digest, rung) in alive.items()
    ]
    decision = Decision(
        cell=cell,
        bracket=number,
        step=step,
        scheduler=scheduler,
        rows=rows,
        kept=_kept(rows),
    )
    objects.write_bytes(url, (json.dumps(asdict(decision), indent=1) + "\n").encode())
    return decision


def decision_url(sweep: str, cell: str, number: int, step: int) -> str:
    return objects.join(sweep, "decisions", f"{cell}-{number}-{step}.json")


def read_decision(url: str) -> Decision | None:
    try:
        return documents.read(url, Decision, remedy=REMEDY)
    except FileNotFoundError:
        return None


def replay(decision: Decision) -> list[int]:
    """Who goes on by the numbers in a decision; equal to its `kept` unless somebody changed either."""
    return _kept(decision.rows)


def _kept(rows: Sequence[Row]) -> list[int]:
    scores: dict[int, tuple[float, float] | None] = {}
    for row in rows:
        score, loss = row["score"], row["loss"]
        scores[row["index"]] = None if score is None or loss is None else (score, loss)
    return survivors(scores)


def work_url(sweep: str, digest: str) -> str:
    return objects.join(sweep, "work", digest)


def remove_work(sweep: str, digest: str) -> None:
    """Of a trial that is over, with what it trained before (`transfer.sweep.finetune.begin_stages`)."""
    for name in ("", "-teacher", "-first"):
        objects.remove_tree(work_url(sweep, digest) + name)


def asha_url(sweep: str, cell: str) -> str:
    return objects.join(sweep, "decisions", f"{cell}-asha.json")


def read_asha(sweep: str, cell: str) -> list[dict[str, Any]]:
    """Events of ASHA in a cell: digest, step, accuracy, verdict, time_s."""
    try:
        return [dict(event) for event in documents.read(asha_url(sweep, cell), list[AshaEvent], remedy=REMEDY)]
    except FileNotFoundError:
        return []


def write_asha(sweep: str, cell: str, events: list[dict[str, Any]]) -> None:
    objects.write_bytes(asha_url(sweep, cell), (json.dumps(events, indent=1) + "\n").encode())
