"""`normfree track`: what became of the records of a run, and what only somebody who still lives can do for it."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path
from typing import Any

from orchestration import heartbeat, spool_mirror
from orchestration.alive import only_one
from orchestration.tracking import connect, local_twin, resolve_uri, sqlite_file
from orchestration.tracking_records import cause
from pipeline import storage
from pipeline.errors import UserError
from pipeline.redact import public

STATUS_MARK = {"RUNNING": "running", "FINISHED": "finished", "FAILED": "failed", "KILLED": "killed"}
SPOOL, LOCK, CONFIG = "records.jsonl", "tracking.lock", "run.yaml"
EXIT_NOT_UPLOADED = 3


def track_import(args: argparse.Namespace) -> int:
    """Send the records of a run or sweep, wherever it lies, to a server; 0 all is there, 3 the server did not take all."""
    from orchestration.sweep_records import is_sweep

    folder = local_twin(args.run)
    if is_sweep(args.run):
        if args.experiment or args.run_name:
            raise UserError(
                f"{args.run} is a sweep, which has a parent run and children under names of their own; leave out "
                "--experiment and --run-name"
            )
        uri = _uri(args.tracking_uri, folder)
        _refuse_the_dead(uri)
        return _send_sweep(args.run, uri)
    _fetch(args.run, folder)
    uri = _uri(args.tracking_uri, folder)
    _refuse_the_dead(uri)
    return _send_run(args.run, folder, uri, experiment=args.experiment, run_name=args.run_name)


def track_status(args: argparse.Namespace) -> int:
    """List a server's runs with how they ended, after ending those that fell silent."""
    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri or not args.run:
        uri = _uri(uri, None)
    else:
        uri = records_of(args.run)
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


def records_of(url: str) -> str:
    """The tracking URI of a run's or sweep's own records; those of a folder in an object store are brought here first.

    They are put together in SQLite on this machine, from the spool or the ledger; a second call brings what is new. Where
    this machine trains the run, its own records are newer than those in the store, and stand. Raises UserError for a folder
    without records.
    """
    folder = local_twin(url)
    uri = resolve_uri(None, folder)
    if storage.is_local(url):
        return uri
    from orchestration.sweep_records import is_sweep

    if is_sweep(url):
        _send_sweep(url, uri, show=False)
        return uri
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder / LOCK, lambda: False, wait_s=0.0) as is_free:
        if is_free:
            _fetch(url, folder)
    if is_free:
        _send_run(url, folder, uri, show=False)
    elif not (folder / "mlflow.db").exists():
        raise UserError(f"{url} is trained on this machine now and tells another tracker; give its --tracking-uri")
    return uri


def _send_sweep(url: str, uri: str, *, show: bool = True) -> int:
    from orchestration.sweep_records import SweepRecords

    if not SweepRecords(url, uri).send_all(here=False):
        return EXIT_NOT_UPLOADED
    if show:
        print(f"{public(uri)} has the sweep {url}")
    return 0


def _send_run(url: str, folder: Path, uri: str, *, show: bool = True, **names: str | None) -> int:
    from orchestration.uploader import Uploader

    uploader = Uploader(folder, uri, **names)  # type: ignore[arg-type]
    status = uploader.run()
    if status == 0 and show:
        print(f"{uploader.num_sent} records of {url} sent; {public(uri)} has all {uploader.num_known} of them")
        print(f"run {uploader.run_id} in experiment {uploader.experiment!r}: {uploader.status}")
    return status


def _fetch(url: str, folder: Path) -> None:
    """The records of a run in an object store, and its configuration, into its folder on this machine."""
    if not storage.is_local(url):
        folder.mkdir(parents=True, exist_ok=True)
        spool_mirror.pull(url, folder)
        with contextlib.suppress(FileNotFoundError):
            storage.write_bytes(folder / CONFIG, storage.read_bytes(storage.join(url, CONFIG)))
    if not (folder / SPOOL).exists():
        raise UserError(
            f"no records of a run or sweep at {url} (no {SPOOL}, no sweep.json); give the folder of one that has started"
        )


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
