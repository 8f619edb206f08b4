"""What happened in a run, in one order of time: its records, the reports of frozen ranks, and what its ranks wrote.

Each machine stamps its own lines, so those of two machines are in order as far as their clocks agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from orchestration.operations import run_folder
from orchestration.operations.run_folder import LogFile, Records
from orchestration.spool.rank_logs import is_consequence, is_error
from pipeline.supervision import hang_report

SAME_S = 5.0
"""Ranks that write the same within this time are one line."""


@dataclass(frozen=True, kw_only=True)
class Event:
    time_s: float
    text: str
    kind: str
    """Of a record, "hang" or "line"."""
    ranks: tuple[int, ...] = ()
    """Whose line it is; none: the run's."""
    host: str = ""
    is_error: bool = False
    is_consequence: bool = False
    """It speaks of the loss of another process."""


def _attempt(r: dict[str, Any]) -> str:
    return f"start {r.get('attempt')} on {r.get('host')}, process {r.get('pid')}: {r.get('environment.command', '')}"


def _started(r: dict[str, Any]) -> str:
    where = r.get("resumed_from") or "its initial weights"
    return f"step {r['step']} of {r['total_steps']} from {where}; {r.get('num_ranks')} processes, {r.get('device')}"


def _evaluated(r: dict[str, Any]) -> str:
    return f"evaluated at step {r['step']}: top-1 {r['top1']:.2%}, loss {r['loss']:.4f} on {r['split']}"


def _lost(r: dict[str, Any]) -> str:
    first = r["samples"][0]
    return f"step {r['step']} lost {len(r['samples'])} samples, first {first['key']} of {first['shard']}: {first['reason']}"


SAYS: dict[str, tuple[Callable[[dict[str, Any]], str], bool]] = {
    "Attempt": (_attempt, False),
    "Started": (_started, False),
    "Changed": (lambda r: str(r["text"]), False),
    "Notice": (lambda r: str(r["text"]), False),
    "Deviation": (lambda r: f"wrong resume: {r['text']}" if r["is_certain"] else f"odd resume: {r['text']}", True),
    "PassedOver": (lambda r: f"passed over {r['url']}: {r['reason']}", True),
    "Saved": (lambda r: f"saved step {r['step']}: {r['url']}", False),
    "Profiled": (lambda r: f"steps {r['first']} to {r['last']} were profiled: {r['url']}", False),
    "SaveFailed": (lambda r: f"step {r['step']} not saved: {r['reason']}", True),
    "SaveSkipped": (lambda r: f"step {r['step']} not saved: {r['reason']}", True),
    "Skipped": (lambda r: f"update after step {r['step']} skipped: {r['reason']}", True),
    "RolledBack": (lambda r: f"back from step {r['from_step']} to {r['checkpoint']}: {r['reason']}", True),
    "Lost": (_lost, True),
    "Evaluation": (_evaluated, False),
    "Finished": (lambda r: f"finished at step {r['step']}", False),
    "Stopped": (lambda r: f"stopped at step {r['step']}: {r['reason']}", False),
    "Failed": (lambda r: f"failed: {r['error']}", True),
}
"""Kind of record -> what it says, and whether that is an error."""


def of_records(records: Records) -> Iterator[Event]:
    for record in records.events:
        says = SAYS.get(record["kind"])
        if says is None:
            continue
        try:
            text = says[0](record)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):  # of another version
            text = record["kind"]
        yield Event(
            time_s=float(record["time_s"]),
            text=text,
            kind=record["kind"],
            host=str(record.get("host", "")),
            is_error=says[1],
            is_consequence=is_consequence(text),
        )


def of_hangs(reports: Iterable[dict[str, Any]]) -> Iterator[Event]:
    for report in reports:
        ranks, host = tuple[int, ...](), ""
        try:
            first = report["frozen"][0]
            ranks, host = (int(first["rank"]),), str(first["host"] or "")
            text = hang_report.sentence(report, report["file"])
        except (KeyError, TypeError, IndexError, ValueError):
            text = f"a rank froze; see {report['file']}"
        yield Event(time_s=float(report["time_s"]), text=text, kind="hang", ranks=ranks, host=host, is_error=True)


def of_logs(files: Iterable[LogFile], *, console: bool) -> Iterator[Event]:
    """What is new in them; without the `console` of rank 0, which shows the records of the run."""
    for file in files:
        for line in file.lines():
            if line.source == "out" and file.name.rank == 0 and not console:
                continue
            yield Event(
                time_s=line.time_s,
                text=line.text,
                kind="line",
                ranks=(file.name.rank,),
                host=file.name.host,
                is_error=is_error(line.text),
                is_consequence=is_consequence(line.text),
            )


def folded(events: Iterable[Event]) -> list[Event]:
    """In order of time; the same line of several ranks at about one time is one."""
    found: list[Event] = []
    places: dict[str, int] = {}
    for event in sorted(events, key=lambda e: e.time_s):
        if event.kind == "line":
            key = re.sub(r"0x[0-9a-f]+|\d+", "#", event.text)
            place = places.get(key)
            if (
                place is not None
                and event.time_s - found[place].time_s < SAME_S
                and event.ranks[0] not in found[place].ranks
            ):
                ranks = tuple(sorted({*found[place].ranks, *event.ranks}))
                found[place] = replace(found[place], ranks=ranks)
                continue
            places[key] = len(found)
        found.append(event)
    return found


def timeline(url: str, *, rank: int | None = None) -> list[Event]:
    """All of a run, or what one of its ranks wrote."""
    events = list(of_logs(run_folder.log_files(url, rank), console=rank is not None))
    if rank is None:
        events += [*of_records(run_folder.records(url)), *of_hangs(run_folder.hangs(url))]
    return folded(events)


def first_error(events: list[Event]) -> Event | None:
    """The first one since the last start that had any; one that only follows from the loss of another process comes second."""
    starts = [i for i, event in enumerate(events) if event.kind == "Attempt"]
    bounds = [0, *starts, len(events)]
    for begin, end in reversed(list(pairwise(bounds))):
        errors = [event for event in events[begin:end] if event.is_error]
        causes = [event for event in errors if not event.is_consequence]
        if errors:
            return (causes or errors)[0]
    return None


def ranks_text(ranks: tuple[int, ...]) -> str:
    """ "rank 3", "ranks 0-3,7"; "" for none."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}" if text else ""
