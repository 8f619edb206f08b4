"""Who reads the records of a run on rank 0: the console, the spool on disk, and through it the tracker."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from orchestration.console import Console
from orchestration.spool import Spool
from orchestration.tracking import start_uploader
from pipeline import storage
from pipeline.config import Run
from pipeline.records import Finished, Phase, Record, Stopped
from pipeline.redact import public


class Readers:
    """Hands each record to the spool first (it is on disk before anybody acts on it), then to the console."""

    def __init__(self, run: Run, out: str, tracking_uri: str | None) -> None:
        # The spool is local by law: an object store cannot be appended to. A remote run folder gets a local twin for it.
        if storage.is_local(out):
            self.run_dir = Path(storage.local_path(out))
        else:
            self.run_dir = Path(tempfile.gettempdir()) / "normfree-spools" / out.replace("://", "-").replace("/", "-")
        self.out, self.run = out, run
        self.tracking_uri = tracking_uri or f"sqlite:///{self.run_dir.resolve() / 'mlflow.db'}"
        self._console = Console()
        self._spool: Spool | None = None

    def read(self, record: Record) -> None:
        if self._spool is None and isinstance(record, Phase):
            self._console.read(record)  # nothing is written yet: a run that is refused while it starts leaves no trace
            return
        if self._spool is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._spool = Spool(self.run_dir / "records.jsonl")
            self._uploader = start_uploader(
                str(self.run_dir), self.tracking_uri, experiment="pretrain", run_name=self.run.name
            )
        self._spool.append(record)
        if isinstance(record, Finished):
            self._console.read(record, next_command=self._next(record))
        elif isinstance(record, Stopped):
            self._console.read(record, next_command=f"normfree {public(shlex.join(sys.argv[1:]))}")
        else:
            self._console.read(record)

    def _next(self, record: Finished) -> str:
        return f"normfree transfer {shlex.quote(record.checkpoint or self.out)} --suite small_images --data-root DATA --out SWEEP"

    def close(self, *, failed: str | None) -> None:
        self._console.close()
        if self._spool is None:
            return
        if failed is not None:
            self._spool.append_failure(failed)
        self._spool.close()
        # The uploader goes on alone until everything is there; a dead server never holds the run.
        if os.environ.get("NORMFREE_WAIT_FOR_TRACKER", "1") == "1":
            self._uploader.wait()
