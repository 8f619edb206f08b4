"""Who reads the records of a run on rank 0: the console, the spool on disk, and through it the tracker."""

import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

from orchestration.run.console import Console
from orchestration.spool import mirror
from orchestration.spool.spool import Spool, records_folder
from orchestration.spool.system_metrics import start_sampler
from orchestration.tracking.mlflow_client import DRAIN_S
from orchestration.tracking.start_uploader import start_uploader
from orchestration.tracking.tracking_uri import resolve_uri
from pipeline.display import shell
from pipeline.errors import UserError
from pipeline.provenance import command, facts
from pipeline.records import Finished, Phase, Record, Stopped
from pipeline.secrets import public
from pipeline.storage import objects
from pipeline.supervision.stop_signals import StopSignal, say
from pipeline.training.run import Run

SAY_AFTER_S = 2.0
RETRY_EVERY_S = 20.0
POLL_S = 0.05
EXIT_S = 2.0  # of a stop signal's grace, for the rest of the way out


class Readers:
    """Hands each record to the spool first (it is on disk before anybody acts on it), then to the console.

    Neither can end a run: what fails (a full disk, a terminal that was closed, a `| head` that has seen enough) is reported once,
    and tried again later.
    """

    def __init__(
        self,
        run: Run,
        out: str,
        tracking_uri: str | None,
        stop: StopSignal | None = None,
        *,
        terminal: TextIO | None = None,
    ) -> None:
        """`terminal`: shows the live line, where standard output goes to a log, which gets plain lines."""
        self.run_dir = records_folder(out)
        self.out, self.run = out, run
        self.tracking_uri = resolve_uri(tracking_uri, self.run_dir)
        self._stop = stop or StopSignal()
        self._consoles = [Console(live=False), Console(terminal)] if terminal else [Console()]
        self._console_guards = [FailureGuard("the lines of the console") for _ in self._consoles]
        self._records_guard = FailureGuard("records")
        self._spool: Spool | None = None
        self._uploader: subprocess.Popen[bytes] | None = None
        self._restart_after_s = 0.0
        self._wait_s = _wait_s()

    def read(self, record: Record) -> None:
        # Nothing is written before there is a plan: a run that is refused while it starts leaves no trace.
        if self._spool is not None or not isinstance(record, Phase):
            self._records_guard.run(lambda: self._keep(record))
        for console, guard in zip(self._consoles, self._console_guards, strict=True):
            guard.run(partial(console.read, record, next_command=self._next(record)))

    def _keep(self, record: Record) -> None:
        if self._spool is None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            if not objects.is_local(self.out):
                self._pull()
            self._spool = Spool(self.run_dir / "records.jsonl", facts())
        self._spool.append(record)
        self._keep_uploader()

    def _pull(self) -> None:
        """What other machines wrote of this run: it is one run on the tracker, wherever it goes on."""
        try:
            mirror.pull(self.out, self.run_dir)
        except Exception as error:  # records are no reason not to train
            say(f"tracking: cannot read what {self.out} holds of earlier attempts ({error})")

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
        status = -1 if self._uploader is None else self._uploader.poll()
        if status is None or status >= 0 or time.monotonic() < self._restart_after_s:
            return
        self._restart_after_s = time.monotonic() + RETRY_EVERY_S
        self._start()

    def _next(self, record: Record) -> str:
        """What is to be typed after a record that ends the run."""
        if isinstance(record, Stopped):
            return command()
        if not isinstance(record, Finished):
            return ""
        checkpoint = shell([record.checkpoint or self.out])
        return f"normfree transfer {checkpoint} --suite small_images --data-root DATA --out SWEEP"

    def close(self, *, failed: str | None, waits: bool = True) -> None:
        """`waits`: for the tracker to take the last records; the uploader sends them in any case."""
        for console, guard in zip(self._consoles, self._console_guards, strict=True):
            guard.run(console.close, now=True)
        self._records_guard.run(lambda: self._close_records(failed), now=True)
        if self._uploader is not None and self._wait_s and waits:
            self._wait()

    def _close_records(self, failed: str | None) -> None:
        if self._spool is None:
            return
        try:
            if failed is not None:
                self._spool.append_failure(failed)
            self._spool.close()
        finally:
            self._restart_after_s = 0.0
            self._keep_uploader()

    def _wait(self) -> None:
        """Until the tracker knows all, for `_wait_s` at most, a stop signal's grace or the next stop signal.

        The uploader is a process of its own: where this command does not wait, or leaves, it works on and ends by itself.
        """
        if self._uploader_ends(min(SAY_AFTER_S, self._wait_s)):
            return
        where = public(self.tracking_uri)
        say(f"waiting for MLflow at {where} to take the last records ({self._wait_s:g} s at most)")
        if not self._uploader_ends(self._wait_s - SAY_AFTER_S):
            say(
                f"tracking: MLflow at {where} has not taken all records yet; the uploader goes on without this command, and no "
                "record is lost. If it reports that some are missing, this sends them: "
                f"{shell(['normfree', 'track', 'import', self.out, '--tracking-uri', where])}"
            )

    def _uploader_ends(self, limit_s: float) -> bool:
        assert self._uploader is not None
        was_stopped, end_s = self._stop.requested, time.monotonic() + limit_s
        while self._uploader.poll() is None:
            is_asked = self._stop.requested and not was_stopped
            if is_asked or time.monotonic() > end_s or self._stop.left_s < EXIT_S:
                return False
            time.sleep(POLL_S)
        return True


class FailureGuard:
    """Keeps failures of a reader of records away from the run."""

    def __init__(self, what: str) -> None:
        self._what, self._is_reported, self._again_s = what, False, 0.0

    def run(self, work: Callable[[], None], *, now: bool = False) -> None:
        """`work()`, whatever it raises; not at all for a while after it failed, but where it is asked for `now`."""
        if not now and time.monotonic() < self._again_s:
            return
        try:
            work()
        except (Exception, SystemExit) as error:  # rich ends the program whose reader is gone
            self._again_s = time.monotonic() + RETRY_EVERY_S
            if not self._is_reported:
                text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                say(f"{self._what}: nobody takes them, or there is no room ({public(text)}); training goes on")
            self._is_reported = True


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
        self._guard = FailureGuard("system metrics")

    def read(self, record: Record) -> None:
        if self._sampler is None and not isinstance(record, Phase):
            self._guard.run(self._start)

    def _start(self) -> None:
        self._sampler = start_sampler(records_folder(self._out), None if objects.is_local(self._out) else self._out)
