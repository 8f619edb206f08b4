"""`normfree status` of a sweep: trials that are over, of how many, failed ones, the best, and how long the rest takes."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from typing import Any

from orchestration.operations.status import mlflow_link, owner_facts
from pipeline.errors import UserError
from pipeline.storage import listing, objects, ownership
from transfer.metric_facts import facts_of
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.ledger import Ledger

RECENT = 40
"""Trials whose pace tells how long the rest takes."""


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    what: str
    name: str
    url: str
    state: str
    """running, finished, unfinished"""
    is_alive: bool
    owner: dict[str, Any] | None
    num_done: int
    """Trials that are over, failed ones too."""
    num_trials: int | None
    """In all; None of a sweep of an earlier version."""
    running: list[str]
    """What runs now, as the driver told within the last seconds."""
    num_failed: int
    failures: list[str]
    best: dict[str, str]
    """Task -> its best final trial."""
    left_s: float | None
    mlflow: str = ""
    resume_command: str = ""
    notes: list[str] = field(default_factory=list)


def sweep_status(url: str, *, brief: bool = False) -> SweepStatus:
    """Of the sweep in the folder `url`; `brief`: entries are counted and not read."""
    ledger = Ledger(url)
    info, owner = ledger.info(), ownership.look(url)
    alive = owner is not None and ownership.is_alive(url, owner)
    trials = [i for i in listing.items(objects.join(url, "trials")) if i.name.endswith(".json")]
    entries, notes = ([], []) if brief else _entries(ledger)
    failed = [entry for entry in entries if entry.status == "failed"]
    planned = info.num_trials or None
    is_done = planned is not None and len(trials) >= planned
    return SweepStatus(
        what="sweep",
        name=f"{info.suite} of {info.model}",
        url=url,
        state="running" if alive else "finished" if is_done else "unfinished",
        is_alive=alive,
        owner=owner_facts(owner),
        num_done=len(trials),
        num_trials=planned,
        running=ledger.running() if alive and not brief else [],
        num_failed=len(failed),
        failures=[f"{e.task} {e.method} {e.init} {e.shots} shots: {e.error}" for e in failed],
        best=_best(entries),
        left_s=_left_s(trials, planned) if alive else None,
        mlflow=mlflow_link(url),
        resume_command=""
        if alive or (is_done and not any(e.lacks_result for e in failed))
        else _resume_command(info.folder, info.command),
        notes=notes,
    )


def _entries(ledger: Ledger) -> tuple[list[LedgerEntry], list[str]]:
    try:
        return list(ledger.entries()), []
    except UserError as error:
        return [], [str(error)]


def _best(entries: list[LedgerEntry]) -> dict[str, str]:
    found: dict[str, LedgerEntry] = {}
    for entry in entries:
        if entry.kind == "final" and entry.is_ok:
            before = found.get(entry.task)
            if before is None or (before.value or 0.0) < (entry.value or 0.0):
                found[entry.task] = entry
    return {
        task: f"{facts_of(e.metric).full_text(e.value)}, {e.method} {e.init} at {e.shots} shots"
        if e.value is not None
        else ""
        for task, e in sorted(found.items())
    }


def _left_s(trials: list[listing.Item], planned: int | None) -> float | None:
    times = sorted(item.modified_s for item in trials if item.modified_s)[-RECENT:]
    if planned is None or len(times) < 4:
        return None
    pace_s = (max(times[-1], time.time()) - times[0]) / (len(times) - 1)
    return max(0, planned - len(trials)) * pace_s


def _resume_command(folder: str, command: str) -> str:
    return f"cd {shlex.quote(folder)} && {command}" if folder else command
