"""What candidates had reached at a rung, and who went on: written down, so that a decision is taken once and can be played again.

<sweep>/rungs/<trial>-<step>.json                where a candidate stood, written by the worker that brought it there
<sweep>/decisions/<cell>-<bracket>-<step>.json   who went on, and from which numbers that follows
<sweep>/decisions/<cell>-asha.json               under ASHA: all that it was told, in order, and its verdicts
<sweep>/work/<trial>/                            the loop's own run folder of a trial that is under way
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.storage import objects
from transfer.search.grids import Bracket, survivors


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
    rows: list[dict[str, Any]]
    """Of each candidate that had come so far: index, digest, score, loss; null where it had failed."""
    kept: list[int]
    """Their indices."""
    time_s: float = field(default_factory=time.time)


def rung_url(sweep: str, digest: str, step: int) -> str:
    return objects.join(sweep, "rungs", f"{digest}-{step}.json")


def write_rung(sweep: str, rung: Rung) -> None:
    objects.write_bytes(rung_url(sweep, rung.digest, rung.step), (json.dumps(asdict(rung)) + "\n").encode())


def read_rung(sweep: str, digest: str, step: int) -> Rung | None:
    try:
        return Rung(**json.loads(objects.read_bytes(rung_url(sweep, digest, step))))
    except FileNotFoundError:
        return None


def decide(
    sweep: str,
    cell: str,
    number: int,
    bracket: Bracket,
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
        return there
    scores = {i: None if rung is None else (rung.score, rung.loss) for i, (_, rung) in alive.items()}
    rows = [
        {"index": i, "digest": digest, "score": rung.score if rung else None, "loss": rung.loss if rung else None}
        for i, (digest, rung) in alive.items()
    ]
    decision = Decision(
        cell=cell,
        bracket=number,
        step=step,
        scheduler=scheduler,
        rows=rows,
        kept=survivors(bracket, list(alive), scores),
    )
    objects.write_bytes(url, (json.dumps(asdict(decision), indent=1) + "\n").encode())
    return decision


def decision_url(sweep: str, cell: str, number: int, step: int) -> str:
    return objects.join(sweep, "decisions", f"{cell}-{number}-{step}.json")


def read_decision(url: str) -> Decision | None:
    try:
        return Decision(**json.loads(objects.read_bytes(url)))
    except FileNotFoundError:
        return None


def replay(decision: Decision, bracket: Bracket) -> list[int]:
    """Who goes on by the numbers in a decision; equal to its `kept` unless somebody changed either."""
    scores = {r["index"]: None if r["score"] is None else (r["score"], r["loss"]) for r in decision.rows}
    return survivors(bracket, [r["index"] for r in decision.rows], scores)


def work_url(sweep: str, digest: str) -> str:
    return objects.join(sweep, "work", digest)


def asha_url(sweep: str, cell: str) -> str:
    return objects.join(sweep, "decisions", f"{cell}-asha.json")


def read_asha(sweep: str, cell: str) -> list[dict[str, Any]]:
    """Events of ASHA in a cell: digest, step, accuracy, verdict, time_s."""
    try:
        return list(json.loads(objects.read_bytes(asha_url(sweep, cell))))
    except FileNotFoundError:
        return []


def write_asha(sweep: str, cell: str, events: list[dict[str, Any]]) -> None:
    objects.write_bytes(asha_url(sweep, cell), (json.dumps(events, indent=1) + "\n").encode())
