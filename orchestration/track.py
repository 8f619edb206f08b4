"""`normfree track`: what became of the records of a run, and what only somebody who still lives can do for it."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from orchestration import heartbeat, spool_mirror
from orchestration.tracking import connect, local_twin, resolve_uri, sqlite_file
from orchestration.tracking_records import cause
from pipeline import storage
from pipeline.errors import UserError
from pipeline.redact import public

STATUS_MARK = {"RUNNING": "running", "FINISHED": "finished", "FAILED": "failed", "KILLED": "killed"}


def track_import(args: argparse.Namespace) -> int:
    """Send the spool of a run, wherever it lies, to a server; 0 all is there, 3 the server did not take all of it."""
    from orchestration.uploader import Uploader

    run_dir = local_twin(args.run)
    if not storage.is_local(args.run):
        run_dir.mkdir(parents=True, exist_ok=True)
        spool_mirror.pull(args.run, run_dir)
    if not (run_dir / "records.jsonl").exists():
        raise UserError(
            f"no records of {args.run} (records.jsonl is missing); give the folder of a run that has started"
        )
    uri = _uri(args.tracking_uri, run_dir)
    _refuse_the_dead(uri)
    uploader = Uploader(run_dir, uri, experiment=args.experiment, run_name=args.run_name)
    status = uploader.run()
    if status == 0:
        print(f"{uploader.num_sent} records of {args.run} sent; {public(uri)} has all {uploader.num_known} of them")
        print(f"run {uploader.run_id} in experiment {uploader.experiment!r}: {uploader.status}")
    return status


def track_status(args: argparse.Namespace) -> int:
    """List a server's runs with how they ended, after ending those that fell silent."""
    uri = _uri(args.tracking_uri, Path(args.run) if args.run else None)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"no MLflow records at {file}; give the folder of a run or sweep that has started, or its URI")
    _refuse_the_dead(uri)
    client = connect(uri)
    experiments = heartbeat.all_experiments(client)
    for run_id, why in heartbeat.sweep_once(client, experiments):
        print(f"marked {run_id} as failed: {why}")
    for run in client.search_runs(experiments, max_results=args.limit):
        print(_line(run))
    return 0


def _line(run: Any) -> str:
    tags, status = run.data.tags, STATUS_MARK.get(run.info.status, run.info.status.lower())
    note = tags.get(heartbeat.CAUSE_TAG, "")
    if run.info.status == "RUNNING":
        sign = tags.get(heartbeat.BEAT_TAG)
        note = f"last sign of life {time.time() - float(sign):.0f} s ago" if sign else "gives no signs of life"
    attempts = f", attempt {tags['attempt']}" if tags.get("attempt", "1") != "1" else ""
    return f"{run.info.run_id}  {status:8}  {run.info.run_name}{attempts}{': ' + note if note else ''}"


def _uri(given: str | None, run_dir: Path | None) -> str:
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and run_dir is None:
        raise UserError("which server? give --tracking-uri, set MLFLOW_TRACKING_URI, or name the folder of a run")
    return resolve_uri(uri, run_dir or ".")


def _refuse_the_dead(uri: str) -> None:
    """A server that does not answer a person's command is a mistake to mend now, not one to wait for."""
    if sqlite_file(uri) is not None:
        return
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:
        raise UserError(
            f"cannot use MLflow at {public(uri)} ({cause(error)}); check the address and credentials"
        ) from None
