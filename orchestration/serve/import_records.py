"""Records of a run or sweep, wherever it lies, into an MLflow server or this machine's SQLite."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from orchestration.spool import mirror
from orchestration.spool.process_lock import only_one
from orchestration.spool.spool import MAIN, records_folder
from orchestration.tracking import heartbeat
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.tracking_uri import resolve_uri, sqlite_file
from orchestration.tracking.upload import EXIT_NOT_UPLOADED, cause
from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage import objects
from pipeline.yaml_files.parse import read_yaml

LOCK, CONFIG = "tracking.lock", "run.yaml"


def records_of(url: str) -> str:
    """The tracking URI of a run's or sweep's own records; those of a folder in an object store are brought here first.

    They are put together in SQLite on this machine, from the spool or the ledger; a second call brings what is new. Where
    this machine trains the run, its own records are newer than those in the store, and stand. Raises UserError for a folder
    without records.
    """
    folder = records_folder(url)
    uri = resolve_uri(None, folder)
    if objects.is_local(url):
        return uri
    from orchestration.tracking.sweep_records import is_sweep

    if is_sweep(url):
        send_sweep(url, uri, show=False)
        return uri
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder / LOCK, lambda: False, wait_s=0.0) as is_free:
        if is_free:
            fetch(url, folder)
    if is_free:
        send_run(url, folder, uri, show=False)
    elif not (folder / "mlflow.db").exists():
        raise UserError(f"{url} is trained on this machine now and tells another tracker; give its --tracking-uri")
    return uri


def send_sweep(url: str, uri: str, *, show: bool = True) -> int:
    from orchestration.tracking.sweep_records import SweepRecords

    if not SweepRecords(url, uri).send_all(here=False):
        return EXIT_NOT_UPLOADED
    if show:
        print(terminal(f"{public(uri)} has the sweep {url}"))
    return 0


def send_run(url: str, folder: Path, uri: str, *, show: bool = True, **names: str | None) -> int:
    from orchestration.tracking.uploader import Uploader

    uploader = Uploader(folder, uri, **names)  # type: ignore[arg-type]
    status = uploader.run()
    if status == 0 and show:
        print(
            terminal(f"{uploader.num_sent} records of {url} sent; {public(uri)} has all {uploader.num_known} of them")
        )
        print(terminal(f"run {uploader.run_id} in experiment {uploader.experiment!r}: {uploader.status}"))
    return status


def fetch(url: str, folder: Path) -> None:
    """The records of a run in an object store, and its configuration, into its folder on this machine."""
    if not objects.is_local(url):
        folder.mkdir(parents=True, exist_ok=True)
        mirror.pull(url, folder)
        with contextlib.suppress(FileNotFoundError):
            objects.write_bytes(folder / CONFIG, read_yaml(objects.join(url, CONFIG)))
    if not (folder / MAIN).exists():
        raise UserError(
            f"no records of a run or sweep at {url} (no {MAIN}, no sweep.json); give the folder of one that has started"
        )


def status_line(run: Any) -> str:
    tags, status = run.data.tags, run.info.status.lower()
    note = tags.get(heartbeat.CAUSE_TAG, "")
    if run.info.status == "RUNNING":
        sign = tags.get(heartbeat.BEAT_TAG)
        note = f"last sign of life {time.time() - float(sign):.0f} s ago" if sign else "gives no signs of life"
    attempts = f", attempt {tags['attempt']}" if tags.get("attempt", "1") != "1" else ""
    return f"{run.info.run_id}  {status:8}  {run.info.run_name}{attempts}{': ' + note if note else ''}"


def tracking_uri(given: str | None, run_dir: Path | None) -> str:
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and run_dir is None:
        raise UserError("which server? give --tracking-uri, set MLFLOW_TRACKING_URI, or name the folder of a run")
    return resolve_uri(uri, run_dir or ".")


def refuse_dead_server(uri: str) -> None:
    """A server that does not answer a person's command is a mistake to mend now, not one to wait for."""
    if sqlite_file(uri) is not None:
        return
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:
        raise UserError(
            f"cannot use MLflow at {public(uri)} ({cause(error)}); check the address and credentials"
        ) from None
