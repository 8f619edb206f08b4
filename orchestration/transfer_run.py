"""`normfree transfer`: runs the sweep, shows it, tracks it, and ends with the scorecard."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from dataclasses import replace
from typing import Any

from orchestration.cluster import Resources
from orchestration.sweep import transfer
from orchestration.sweep_records import SweepRecords
from pipeline import storage
from pipeline.errors import UserError
from transfer.conductor import Budget
from transfer.report import write_report

LINE_EVERY_S = 10.0


def transfer_run(args: argparse.Namespace) -> int:
    """Exit code: 0 all trials have a result, 1 some failed (they are listed, and run again by the same command)."""
    listener = _Listener(args)
    result = transfer(
        args.checkpoint,
        args.suite,
        args.out,
        data_root=args.data_root,
        num_seeds=args.seeds,
        scheduler=args.scheduler,
        budget=parse_budget(args.budget),
        resources=Resources(
            max_concurrent=args.max_concurrent,
            gpus_per_trial=args.gpus_per_trial,
            processes_per_trial=args.processes_per_trial,
            ray_address=args.ray_address,
            trial_limit_s=parse_time_s(args.trial_limit, "--trial-limit") if args.trial_limit else 0.0,
        ),
        on_event=listener.hear,
    )
    paths = write_report(args.out, storage.join(args.out, "report"))
    for row in result.not_run:
        where = f" {row['method']} at {row['shots']} shots" if row["method"] else ""  # else the whole task
        print(f"not run: {row['task']}{where}: {row['reason']}")
    listener.finish()
    if result.spent:
        print(f"the budget of {result.spent} is spent; the same command goes on where this one ended")
    print(f"made {args.out}: {result.num_run} trials now, {result.num_failed} failed, {result.seconds_s:.0f} s")
    print(*(f"{kind}: {path}" for kind, path in paths.items()), sep="\n")
    print(f"next: open {paths['html']}, or: normfree ui {_tracking_words(args)}")
    return 1 if result.num_failed else 0


SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}


def parse_time_s(text: str, where: str) -> float:
    """Seconds, from "90 seconds", "30 minutes", "2 hours" or "1 day"."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(second|minute|hour|day)s?\s*", text)
    try:
        found = float(match[1]) * SECONDS[match[2]] if match else 0.0
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UserError(f"{where} is {text!r}; write a number and a unit, as '30 minutes' or '2 hours'")
    return found


def parse_budget(text: str | None) -> Budget:
    """From "100 trials", "1e6 images", "2 hours" (or another time); several with commas between."""
    budget = Budget()
    for word in (text or "").split(",") if text else []:
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(trial|image)s?\s*", word)
        try:
            number = int(float(match[1])) if match else 0
        except (ValueError, OverflowError):
            number = 0
        if match and number > 0:
            budget = replace(budget, **{f"{match[2]}s": number})
        elif re.search(r"(second|minute|hour|day)s?\s*$", word):
            budget = replace(budget, seconds_s=parse_time_s(word, "--budget"))
        else:
            raise UserError(
                f"--budget is {text!r}; write a number and trials, images or hours, as '2 hours' or '100 trials'"
            )
    return budget


def _tracking_words(args: argparse.Namespace) -> str:
    return f"--tracking-uri {shlex.quote(args.tracking_uri)}" if args.tracking_uri else shlex.quote(args.out)


class _Listener:
    """Hears the sweep's events in the driver: a line for a person, a child run for MLflow."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._found: SweepRecords | None = None
        self._begin_s = self._shown_s = time.monotonic()
        self._live = sys.stderr.isatty()

    def hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "phase":
            self._line(f"{event['name']}")
        elif event["event"] == "selected":
            name = f"{event['task']} {event['method']} {event['init']} {event['shots']} shots"
            self._line(f"selected hyper-parameters for {name}; its test split may be opened now")
        elif event["event"] == "decided":
            self._line(f"{event['cell']}: {event['kept']} of {event['of']} candidates go on from step {event['step']}")
        elif event["event"] == "asked":
            asked = f"trials {event['done'] + 1} to {event['done'] + event['num']} of {event['of']}"
            self._line(f"{event['cell']}: {asked} asked for, from the results of {event['done']}")
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
        if not self._live and now - self._shown_s < LINE_EVERY_S and event["done"] < event["total"]:
            return
        self._shown_s = now
        value = "failed" if entry["value"] is None else f"{entry['value']:.1%}"
        left_s = (now - self._begin_s) / event["done"] * (event["total"] - event["done"])
        line = (
            f"trial {event['done']}/{event['total']}  {entry['task']} {entry['method']} {entry['init']} "
            f"{entry['shots']} shots, {entry['kind']}: {value}  left about {left_s / 60:.0f} min"
        )
        if self._live:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, flush=True)

    def _line(self, text: str) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr)
        print(text, flush=True)

    def _records(self) -> SweepRecords:
        if self._found is None:
            uri = self._args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
            self._found = SweepRecords(self._args.out, uri)
        return self._found

    def finish(self) -> None:
        """Every trial of the ledger, so also those of an earlier start, then the sum of it all."""
        self._records().send_all(here=True)
