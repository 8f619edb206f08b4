"""`normfree logs`: the timeline of a run as lines, the first error at the top; one rank's, errors alone, or as they come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from orchestration.operations import run_folder
from orchestration.operations.timeline import (
    Event,
    first_error,
    folded,
    of_hangs,
    of_logs,
    of_records,
    ranks_text,
    timeline,
)
from pipeline.errors import UserError
from pipeline.storage import listing, objects

POLL_S = 2.0
POLL_STORE_S = 10.0


def show(url: str, *, rank: int | None, errors: bool, lines: int, say: Callable[[str], None]) -> None:
    """UserError for a folder without a run, and for a rank that has no log."""
    refuse_no_run(url, rank)
    events = timeline(url, rank=rank)
    first = first_error(events)
    if first is not None:
        say(f"first error  {line_of(first)}")
    chosen = [event for event in events if event.is_error or not errors]
    last = deque(chosen, maxlen=lines or None)
    if errors and not chosen:
        say("no errors")
    if len(last) < len(chosen):
        say(f"({len(chosen) - len(last):,} earlier lines; --lines 0 shows all)")
    for event in last:
        say(line_of(event))


def follow(news: Iterator[list[Event]], *, errors: bool, poll_s: float, say: Callable[[str], None]) -> None:
    """What comes after the moment when `news` was asked first, until Ctrl-C."""
    while True:
        for event in folded(next(news)):
            if event.is_error or not errors:
                say(line_of(event))
        time.sleep(poll_s)


def poll_s(url: str) -> float:
    return POLL_S if objects.is_local(url) else POLL_STORE_S


def news(url: str, rank: int | None) -> Iterator[list[Event]]:
    """Asked again and again: what has come since it was asked before; first nothing."""
    files: dict[str, run_folder.LogFile] = {}
    records, known, is_first = run_folder.new_records(url), set[str](), True
    while True:
        for file in run_folder.log_files(url, rank):
            files.setdefault(str(file.name), file)
        found = [*of_logs(files.values(), console=rank is not None)]
        if rank is None:
            reports = [report for report in run_folder.hangs(url) if report["file"] not in known]
            known |= {
                report["file"] for report in reports
            }  # by name: the clock of the host that wrote it may be another
            found += [*of_records(next(records)), *of_hangs(reports)]
        yield [] if is_first else found
        is_first = False


def refuse_no_run(url: str, rank: int | None) -> None:
    names = [item.name for item in listing.items(url)]
    if not run_folder.is_run(names) and not run_folder.log_files(url):
        raise UserError(f"there is no run at {url} (no run.yaml, no records); give the folder of one that has started")
    ranks = sorted({file.name.rank for file in run_folder.log_files(url)})
    if rank is not None and rank not in ranks:
        there = f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
        raise UserError(f"{url} has a log of {there}, and none of rank {rank}; give one of those, or leave out --rank")


def line_of(event: Event) -> str:
    when = datetime.fromtimestamp(event.time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    who = ranks_text(event.ranks) or "run"
    mark = "!" if event.is_error else " "
    return f"{when}Z {mark} {who:<10} {event.text}"
