"""`normfree transfer`: runs the sweep, shows it, tracks it, and ends with the scorecard."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestration import sweep_summary
from orchestration.cluster import Resources
from orchestration.provenance import facts
from orchestration.sweep import transfer
from orchestration.sweep_tracking import SweepTracker
from orchestration.tracking_records import DatasetUsed
from pipeline import storage
from pipeline.errors import UserError
from transfer.conductor import Budget
from transfer.imagenet_labels import BESIDE
from transfer.ledger import Ledger
from transfer.report import load_entries, scorecard, write_report
from transfer.scorecard import with_beside

LINE_EVERY_S = 10.0
INTERESTING = ("task", "method", "init", "shots", "seed", "kind", "backbone")


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
    listener.finish(result.num_failed, [Path(p) for p in paths.values() if storage.is_local(p)])
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
        self._tracker: SweepTracker | None = None
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
        self._track(entry)
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

    def _tracking(self) -> SweepTracker:
        if self._tracker is None:
            out = self._args.out
            # MLflow's local bookkeeping of a remote sweep folder lies in a local twin.
            local = (
                storage.local_path(out)
                if storage.is_local(out)
                else tempfile.gettempdir() + "/normfree-sweeps/" + (out.replace("://", "-").replace("/", "-"))
            )
            backbones = [word.rstrip("/").rsplit("/", 1)[-1] for word in self._args.checkpoint]
            name = f"{self._args.suite} of {', '.join(backbones)}"
            self._tracker = SweepTracker(self._args.tracking_uri, "transfer", name, str(local))
        return self._tracker

    def _track(self, entry: dict[str, Any]) -> None:
        name = sweep_summary.trial_name(entry)
        parameters = {k: entry[k] for k in INTERESTING} | entry["hyperparameters"]
        final = entry["metrics"] | ({} if entry["value"] is None else {entry["metric"]: entry["value"]})
        final |= {"seconds_s": entry["seconds_s"], "images_seen": float(entry["images_seen"])}
        tags = {k: str(entry[k]) for k in ("checkpoint_digest", "data_digest", "protocol_digest", "error") if entry[k]}
        tags |= {"suite": self._args.suite, "checkpoint_url": entry["checkpoint_url"]}
        data = DatasetUsed(entry["task"], entry["data_digest"], f"{self._args.data_root}/{entry['task']}", "training")
        self._tracking().child(
            entry["digest"],
            name,
            parameters,
            entry["history"],
            final,
            tags,
            entry["status"],
            [data] if entry["data_digest"] else [],
        )

    def finish(self, num_failed: int, artifacts: list[Path]) -> None:
        """Every trial of the ledger, so also those of an earlier start, then the sum of it all."""
        for entry in Ledger(self._args.out).entries():
            self._track(asdict(entry))
        entries = [asdict(entry) for entry in load_entries(self._args.out)]
        rows = scorecard(load_entries(self._args.out))
        metrics = sweep_summary.spread(entries)
        for row in with_beside(rows):
            name = f"{row.task}/{row.method}/{row.shots}" + (f"/{row.metric}" if row.metric in BESIDE else "")
            for label, value in (("pretrained", row.pretrained), ("scratch", row.scratch), ("gain", row.gain)):
                if value is not None:
                    metrics[f"{name}/{label}"] = value.mean
        info = Ledger(self._args.out).info()
        parameters: dict[str, Any] = {
            "suite": info.suite,
            "checkpoint": info.checkpoint_url,
            "checkpoint_digest": info.checkpoint_digest,
        }
        parameters |= {"model": info.model, "num_seeds": info.num_seeds, "num_failed": num_failed}
        tags = sweep_summary.tags(entries, rows) | {"checkpoint_digest": info.checkpoint_digest}
        self._tracking().parent_summary(parameters, metrics, artifacts, tags | facts())
        self._tracking().close("failed" if num_failed else "ok")
