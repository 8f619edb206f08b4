"""A sweep's ledger in MLflow's terms: a child run a trial, and on the parent the sum of it all.

Everything said here comes from the sweep's folder, wherever that lies: the machine that ran the sweep, another one that
imports it (`normfree track import SWEEP`), and one that only shows it (`normfree ui SWEEP`) tell a server the same, and
find the sweep that is there already.
"""

import hashlib
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestration.spool.spool import records_folder
from orchestration.tracking import sweep_summary
from orchestration.tracking.sweep_tracking import SweepTracker
from orchestration.tracking.upload import DatasetUsed, source_tags
from pipeline.provenance import facts
from pipeline.storage import objects
from transfer.protocol.imagenet_labels import is_extra
from transfer.results.scorecard import scorecard, with_extra_metrics
from transfer.results.sweep_results import load_entries
from transfer.sweep.ledger import Ledger, SweepInfo

EXPERIMENT = "transfer"
INFO = "sweep.json"
INTERESTING = ("task", "method", "init", "shots", "seed", "kind", "backbone")
REPORT = ("scorecard.html", "scorecard.csv", "scorecard.png")


def is_sweep(url: str) -> bool:
    """Whether the folder holds a sweep."""
    return objects.exists(objects.join(url, INFO))


class SweepRecords:
    """The way of one sweep to one server; UserError for a folder without a sweep and for a URI that MLflow would not take."""

    def __init__(self, sweep: str, tracking_uri: str | None) -> None:
        # As others can use it, on this machine at least.
        self._sweep = sweep if "://" in sweep else os.path.abspath(sweep)
        self._ledger = Ledger(self._sweep)
        self._info = self._ledger.info()
        self.folder = records_folder(self._sweep)
        """Holds the account of what was sent, and SQLite where no URI is given."""
        name, begin_s = _name(self._info), self._info.started_s
        self._tracker = SweepTracker(
            tracking_uri, EXPERIMENT, name, self.folder, token=token(self._info), begin_s=begin_s
        )

    def trial(self, entry: dict[str, Any]) -> None:
        """A finished trial as a child run; one that is there already is left alone."""
        parameters = {k: entry[k] for k in INTERESTING} | entry["hyperparameters"]
        several = len(self._info.sources) > 1
        final = entry["metrics"] | ({} if entry["value"] is None else {entry["metric"]: entry["value"]})
        final |= {"seconds_s": entry["seconds_s"], "images_seen": float(entry["images_seen"])}
        if entry["value"] is not None:  # under one name, whatever a task's metric: an axis for all trials of a sweep
            final["score"] = entry["value"]
        tags = {k: str(entry[k]) for k in ("checkpoint_digest", "data_digest", "protocol_digest", "error") if entry[k]}
        tags |= {"suite": self._info.suite, "checkpoint_url": entry["checkpoint_url"]}
        place = objects.join(self._info.plan.get("data_root", ""), entry["task"])
        data = DatasetUsed(entry["task"], entry["data_digest"], place, "training")
        self._tracker.child(
            entry["digest"],
            sweep_summary.trial_name(entry, several_sources=several),
            parameters,
            entry["history"],
            final,
            tags,
            entry["status"],
            [data] if entry["data_digest"] else [],
        )

    def send_all(self, *, here: bool) -> bool:
        """Every trial of the ledger, the scorecard and how the sweep stands; whether the server has all of it.

        `here`: the sweep ran in this process, so that our code and environment are its own.
        """
        self._info = self._ledger.info()
        found = load_entries(self._sweep)
        entries = [asdict(entry) for entry in found]
        for entry in entries:
            self.trial(entry)
        rows = scorecard(found)
        metrics = sweep_summary.spread(entries)
        for row in with_extra_metrics(rows):
            name = f"{row.task}/{row.method}/{row.shots}" + (f"/{row.metric}" if is_extra(row.metric) else "")
            for label, value in (("pretrained", row.pretrained), ("scratch", row.scratch), ("gain", row.gain)):
                if value is not None:
                    metrics[f"{name}/{label}"] = value.mean
        info, num_failed = self._info, sum(entry["value"] is None for entry in entries)
        parameters: dict[str, Any] = {
            "suite": info.suite,
            "checkpoint": info.checkpoint_url,
            "checkpoint_digest": info.checkpoint_digest,
            "model": info.model,
            "num_seeds": info.num_seeds,
            "num_failed": num_failed,
        }
        tags = sweep_summary.tags(entries, rows) | {
            "checkpoint_digest": info.checkpoint_digest,
            "sweep_dir": self._sweep,
        }
        command = re.sub(r"^\S*\bcli\.py(?= |$)", "normfree", info.command)  # as it is called where it is not installed
        tags |= facts() if here else {"code.revision": info.code_revision, "environment.command": command}
        tags |= source_tags(tags)
        files = self._report()
        if not files:  # the last thing that a sweep writes before it says that it is done
            tags["status.cause"] = "it has not come to its end: there is no report; the same command goes on with it"
        self._tracker.parent_summary(parameters, metrics, files, tags, checkpoints=_checkpoints(info))
        times = [row["time_s"] for entry in entries for row in entry["history"]]
        return self._tracker.close(
            ("failed" if num_failed else "ok") if files else "killed", None if here or not times else max(times)
        )

    def _report(self) -> list[Path]:
        """The report's files on this machine."""
        urls = [objects.join(self._sweep, "report", name) for name in REPORT]
        if objects.is_local(self._sweep):
            return [path for url in urls if (path := objects.local_path(url)).exists()]
        found = []
        for url in urls:
            if objects.exists(url):
                found.append(self.folder / "report" / url.rpartition("/")[2])
                objects.download(url, found[-1])
        return found


def token(info: SweepInfo) -> str:
    """By which a sweep is known on every server: what stays the same however often it is extended, copied or imported."""
    text = f"{info.started_s!r} {info.first_suite_digest or info.suite_digest} {info.checkpoint_digest}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name(info: SweepInfo) -> str:
    places = [str(source["url"]) for source in info.sources] or [info.checkpoint_url]
    runs = [url.partition("/checkpoints/")[0].rstrip("/").rpartition("/")[2] for url in places]
    return f"{info.suite} of {', '.join(runs)}"


def _checkpoints(info: SweepInfo) -> dict[str, str]:
    """Digest -> URL of the backbones."""
    return {str(s["digest"]): str(s["url"]) for s in info.sources} or {info.checkpoint_digest: info.checkpoint_url}
