"""Who reads the records of a run on rank 0: the console, the spool on disk, and through it the tracker."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

from orchestration.run.console import Console
from orchestration.spool import mirror
from orchestration.spool.spool import Spool
from orchestration.spool.system_metrics import start_sampler
from orchestration.tracking.mlflow_client import DRAIN_S, local_twin, start_uploader
from pipeline.errors import UserError
from pipeline.provenance import command, facts
from pipeline.records import Finished, Phase, Record, Stopped
from pipeline.secrets import public
from pipeline.storage import objects
from pipeline.training.run import Run

CALL_S = 25.0  # a call that the uploader began before the end, with its second try
SAY_AFTER_S = 2.0
RESTART_EVERY_S = 20.0


class Readers:
    """Hands each record to the spool first (it is on disk before anybody acts on it), then to the console."""

    def __init__(self, run: Run, out: str, tracking_uri: str | None) -> None:
        self.run_dir = local_twin(out)
        self.out, self.run = out, run
        self.tracking_uri = tracking_uri or f"sqlite:///{self.run_dir.resolve() / 'mlflow.db'}"
        self._console = Console()
        self._spool: Spool | None = None
        self._restart_after_s = 0.0
        self._wait_s = _wait_s()

    def read(self, record: Record) -> None:
        if self._spool is None and isinstance(record, Phase):
            self._console.read(record)  # nothing is written yet: a run that is refused while it starts leaves no trace
            return
        if self._spool is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if not objects.is_local(self.out):
                self._pull()
            self._spool = Spool(self.run_dir / "records.jsonl", facts())
            self._start()
        self._spool.append(record)
        self._keep_uploader()
        if isinstance(record, Finished):
            self._console.read(record, next_command=self._next(record))
        elif isinstance(record, Stopped):
            self._console.read(record, next_command=command())
        else:
            self._console.read(record)

    def _pull(self) -> None:
        """What other machines wrote of this run: it is one run on the tracker, wherever it goes on."""
        try:
            mirror.pull(self.out, self.run_dir)
        except Exception as error:  # records are no reason not to train
            print(f"tracking: cannot read what {self.out} holds of earlier attempts ({error})", file=sys.stderr)

    def _start(self) -> None:
        self._sampler = start_sampler(self.run_dir)  # there is one already if only the uploader was killed: it leaves
        self._uploader = start_uploader(
            str(self.run_dir),
            self.tracking_uri,
            experiment="pretrain",
            run_name=self.run.name,
            drain_s=self._wait_s or DRAIN_S,
            mirror=None if objects.is_local(self.out) else self.out,
        )

    def _keep_uploader(self) -> None:
        """Another uploader for one that was killed: without its signs of life this run would pass for dead."""
        status = self._uploader.poll()
        if status is None or status >= 0 or time.monotonic() < self._restart_after_s:
            return
        self._restart_after_s = time.monotonic() + RESTART_EVERY_S
        self._start()

    def _next(self, record: Finished) -> str:
        return f"normfree transfer {shlex.quote(record.checkpoint or self.out)} --suite small_images --data-root DATA --out SWEEP"

    def close(self, *, failed: str | None) -> None:
        self._console.close()
        if self._spool is None:
            return
        if failed is not None:
            self._spool.append_failure(failed)
        self._spool.close()
        self._restart_after_s = 0.0
        self._keep_uploader()
        if self._wait_s:
            self._wait()

    def _wait(self) -> None:
        """Until the tracker knows all, or for so long, and until the call ends that is under way then.

        The uploader is a process of its own: where this command does not wait, or leaves, it works on and ends by itself.
        """
        try:
            self._uploader.wait(SAY_AFTER_S)
            return
        except subprocess.TimeoutExpired:
            where = public(self.tracking_uri)
            print(
                f"waiting for MLflow at {where} to take the last records ({self._wait_s:g} s at most)", file=sys.stderr
            )
        try:
            self._uploader.wait(self._wait_s + CALL_S)
        except subprocess.TimeoutExpired:
            print(
                f"tracking: MLflow at {where} keeps the uploader waiting; no record is lost, and this sends what is missing: "
                f"normfree track import {shlex.quote(self.out)} --tracking-uri {shlex.quote(where)}",
                file=sys.stderr,
            )


def _wait_s() -> float:
    """Seconds that the command's end waits for a tracker that does not take the rest: NORMFREE_WAIT_FOR_TRACKER, 30."""
    text = os.environ.get("NORMFREE_WAIT_FOR_TRACKER", str(DRAIN_S))
    try:
        return max(0.0, float(text))
    except ValueError:
        raise UserError(
            f"NORMFREE_WAIT_FOR_TRACKER is {text!r}; set it to a number of seconds, 0 not to wait"
        ) from None


class NodeReader:
    """On each machine but rank 0's: hears the records of one of its ranks, to know when the node works, and samples it."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._sampler: subprocess.Popen[bytes] | None = None

    def read(self, record: Record) -> None:
        if self._sampler is None and not isinstance(record, Phase):
            self._sampler = start_sampler(local_twin(self._out), None if objects.is_local(self._out) else self._out)
