"""What a sweep tells while it runs: lines for a person, child runs for MLflow."""

import argparse
import sys
import time
from typing import Any

from orchestration.run.lines import duration
from orchestration.run.time_left import TimeLeft
from orchestration.tracking.sweep_records import SweepRecords
from orchestration.tracking.tracking_uri import chosen_uri
from pipeline.display import terminal
from transfer.metric_facts import facts_of
from transfer.results.scorecard import shots_text

LINE_EVERY_S = 10.0


class SweepListener:
    """Hears the sweep's events in the driver: a line for a person, a child run for MLflow."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._uri = chosen_uri(args.tracking_uri)
        self._found: SweepRecords | None = None
        self._time_left, self._shown_s = TimeLeft(), time.monotonic()
        self._live = sys.stderr.isatty()

    def hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "phase":
            self._line(f"{event['name']}")
        elif event["event"] == "not_run":
            where = (
                f" {event['method']} at {shots_text(event['shots'])} shots" if event["method"] else ""
            )  # else the whole task
            self._line(f"will not run: {event['task']}{where}: {event['reason']}")
        elif event["event"] == "selected":
            name = f"{event['task']} {event['method']} {event['init']} {event['shots']} shots"
            self._line(f"selected hyper-parameters for {name}; its test split may be opened now")
        elif event["event"] == "decided":
            self._line(f"{event['cell']}: {event['kept']} of {event['of']} candidates go on from step {event['step']}")
        elif event["event"] == "asked":
            asked = f"trials {event['done'] + 1} to {event['done'] + event['num']} of {event['of']}"
            self._line(f"{event['cell']}: {asked} asked for, from the results of {event['done']}")
        elif event["event"] == "again":
            self._line(f"{event['name']} is run again ({event['tries']} tries so far): {event['why']}")
        elif event["event"] == "budget":
            self._line(
                f"the budget of {event['reason']} is spent: trials that run are seen through, no other is started"
            )
        else:
            self._trial(event)

    def _trial(self, event: dict[str, Any]) -> None:
        entry = event["entry"]
        self._records().trial(entry)
        if entry["status"] == "failed":
            self._line(
                f"FAILED {entry['task']} {entry['method']} {entry['init']} {entry['shots']} shots: {entry['error']}"
            )
        now = time.monotonic()
        left_s = self._time_left.left_s(event["done"], event["total"], now)
        if not self._live and now - self._shown_s < LINE_EVERY_S and event["done"] < event["total"]:
            return
        self._shown_s = now
        value = "failed" if entry["value"] is None else facts_of(entry["metric"]).full_text(entry["value"])
        about = "" if left_s is None else f"  left about {duration(left_s)}"
        line = terminal(
            f"trial {event['done']}/{event['total']}  {entry['task']} {entry['method']} {entry['init']} "
            f"{entry['shots']} shots, {entry['kind']}: {value}{about}"
        )
        if self._live:
            print("\r\033[K", line, sep="", end="", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)

    def _line(self, text: str) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr)
        print(terminal(text), flush=True)

    def _records(self) -> SweepRecords:
        if self._found is None:
            self._found = SweepRecords(self._args.out, self._uri)
        return self._found

    def finish(self) -> None:
        """Every trial of the ledger, so also those of an earlier start, then the sum of it all."""
        self._records().send_all(here=True)
