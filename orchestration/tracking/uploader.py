"""The loop of the uploader: follow the spool, send what is new, keep account of it, say at the end how the run ended.

See `orchestration.tracking.mlflow_client` for what it promises. Imports no MLflow itself: that module is the seam to it.
"""

import contextlib
import os
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.figures.run_figures import Pictures
from orchestration.spool.mirror import Mirror, traces
from orchestration.spool.process_lock import only_one
from orchestration.spool.spool import MAIN
from orchestration.spool.state_file import tell, write_state
from orchestration.spool.system_metrics import node_name, spool_name
from orchestration.tracking import heartbeat
from orchestration.tracking.backlog import Backlog, nothing_sent, state_of
from orchestration.tracking.mlflow_client import (
    DRAIN_S,
    connect,
    experiment_id,
    high_water,
    hurry,
    open_run,
    send,
    send_datasets,
    send_file,
)
from orchestration.tracking.tracking_uri import resolve_uri
from orchestration.tracking.upload import EXIT_NOT_UPLOADED, Ending, Upload, cause
from pipeline import places
from pipeline.display import shell
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage.process_identity import started_at

MAX_WAIT_S = 15.0
PICTURES_S = 300.0  # for the last pictures, where nobody waits for a command to end
TOKEN_TAG = "normfree.run"


class Uploader:
    """Sends the spool of `run_dir` until the run is over and all of it is there.

    `watch_pid` None means that the run is over and somebody imports its spool: then there is no haste as long as the
    server takes what it gets. With a process to watch, `drain_s` seconds after its end the uploader gives up.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        tracking_uri: str | None = None,
        *,
        experiment: str | None = None,
        run_name: str | None = None,
        watch_pid: int | None = None,
        drain_s: float = DRAIN_S,
        poll_s: float = 0.5,
        batch_lines: int = 60,
        mirror: str | None = None,
    ) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.uri = resolve_uri(tracking_uri, run_dir)
        self.drain_s, self.poll_s, self.batch_lines = drain_s, poll_s, batch_lines
        self._watch_pid, self._watch_since = watch_pid, started_at(watch_pid)
        self._names = experiment, run_name
        self._client: Any = None
        self._size = batch_lines
        """Lines of a batch: half as many after each failure, for a server may be slow rather than away."""
        self._num_single = 0
        """Lines that go one by one, because the server refuses one of them."""
        self._marks: dict[str, int] = {}
        """The last step of each metric on the server when we connected: we may have sent it without hearing of it."""
        self._next_heartbeat = 0.0
        self._sweeper, self._next_look = heartbeat.Sweeper(), time.monotonic() + heartbeat.LOOK_EVERY_S
        own = MAIN, spool_name(node_name())
        self._mirror = Mirror(self.run_dir, mirror, own=own, bring_others=True) if mirror else None
        self._pictures = Pictures(self.run_dir)
        self._num_refused = 0
        self.num_sent = 0
        """Records that the server took from this uploader."""
        self.status = "RUNNING"
        self._is_reported = False
        """The server knows all records and how the run ended."""
        self._fault = "the server was not reached"

    def run(self) -> int:
        """0 when all is uploaded, 3 when it is not and the time for it is over."""
        # The uploader of an earlier attempt may still be draining, and two of them would double points.
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with only_one(self.run_dir / "tracking.lock", self._alive, wait_s=self.drain_s, poll_s=self.poll_s) as mine:
            self._load()
            if not mine:
                self._fault = "another uploader still works on this folder"
                return self._report()
            self._state.save()  # even if no server is ever reached: a later import knows the names
            with self._mirror or contextlib.nullcontext():
                return self._loop()

    def _loop(self) -> int:
        wait_s, next_try, deadline = 0.0, 0.0, float("inf")
        while True:
            alive = self._alive()  # before the poll, so that the last words of a process now gone are read
            self._backlog.poll()
            over = not alive or (self._backlog.is_caught_up and self._backlog.translator.ending is not None)
            now = time.monotonic()
            if over and deadline == float("inf"):
                deadline, next_try = now + self.drain_s, now
                if self._watch_pid is not None:
                    hurry(self.drain_s / 6)
            if now >= next_try:
                try:
                    if self._work(over):
                        wait_s = 0.0
                        if over and self._watch_pid is None:
                            deadline = time.monotonic() + self.drain_s
                        if time.monotonic() < deadline:
                            continue
                    elif over:
                        return self._report()
                except Exception as error:
                    self._stumble(error)
                    wait_s = min(max(0.5, 2 * wait_s), MAX_WAIT_S, self.drain_s / 4)
                    next_try = time.monotonic() + wait_s
            if time.monotonic() >= deadline:
                return self._report()
            time.sleep(self.poll_s)

    def _work(self, over: bool) -> bool:
        """One batch to the server; False if none is left, and then the run's ending has been reported if it is `over`."""
        if self._client is None:
            self._open()
        if time.monotonic() >= self._next_heartbeat:
            # If this machine dies, nobody is left here to say so; others see that this stands still.
            heartbeat.beat(self._client, self._state["run_id"], revive=not over)
            self._next_heartbeat = time.monotonic() + heartbeat.BEAT_EVERY_S
        self._look_after_others()
        if len(self._backlog) == 0:
            if over and self._backlog.is_caught_up:
                self._conclude()
            return over and not self._backlog.is_caught_up
        batch = self._backlog.first(1 if self._num_single else self._size)
        self._send(batch)
        self._backlog.acknowledge(len(batch))
        self.num_sent += len(batch)
        self._num_single, self._size = max(0, self._num_single - 1), min(self.batch_lines, 2 * self._size)
        self._state.save()
        return True

    def _look_after_others(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + heartbeat.jittered(heartbeat.LOOK_EVERY_S)
        try:
            self._sweeper.look(self._client, [self._experiment_id], spare=self._state["run_id"])
        except Exception as error:  # a server that lets us write our own run only, for one: no reason to stop with ours
            self._log(f"looking after other runs: {cause(error)}\n")

    def _send(self, uploads: list[Upload]) -> None:
        whole = Upload()
        for upload in uploads:
            whole.merge(upload)
        run_id = self._state["run_id"]
        whole.points = [p for p in whole.points if p.step > self._marks.get(p.key, -1)]
        try:
            send(self._client, run_id, whole)
            send_datasets(self._client, run_id, whole.datasets)
        except Exception as error:
            if getattr(error, "error_code", "") not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            # The server will never take this. Find the line that it minds, and let the others through.
            if len(uploads) > 1:
                self._num_single = len(uploads)
                raise
            self._num_refused += 1
            self._log(traceback.format_exc())
            return
        if whole.config is not None:
            self._send_config(whole.config)
            self._pictures.begin()
        self._send_artifacts(traces(self.run_dir, self._mirror, whole.traces), "profiles")
        self._send_artifacts(self._pictures.take(), "pictures")

    def _send_config(self, config: dict[str, Any]) -> None:
        """The resolved configuration as an artifact. Artifacts have a store of their own, which may fail alone."""
        file = self.run_dir / "run.yaml"
        if not os.path.lexists(file):
            file = self.run_dir / "run.json"
            write_state(file, config)
        self._send_artifacts([file])

    def _send_artifacts(self, files: Sequence[Path], folder: str | None = None) -> None:
        for file in files:
            try:
                send_file(self._client, self._state["run_id"], self.run_dir, file, folder)
            except Exception as error:
                if isinstance(error, UserError):
                    tell(f"a file is not sent: {error}")
                self._log(traceback.format_exc())
                send(self._client, self._state["run_id"], Upload(tags={"artifact_error": cause(error)}))

    def _open(self) -> None:
        """Connect, and find the run on the server or make it. Safe to be killed in at any place."""
        client = connect(self.uri)
        experiment = self._experiment_id = experiment_id(client, self.uri, self._state["experiment"])
        try:
            run = open_run(
                client,
                self._state,
                experiment,
                tag=TOKEN_TAG,
                run_name=self._state["run_name"],
                begin_ms=self._backlog.translator.begin_ms,
                fresh=nothing_sent(),
            )
        finally:
            if self._state["run_id"] is None:  # the server has lost it
                self._backlog.rewind()
        if run.info.lifecycle_stage != "active":
            raise RuntimeError(f"its run was deleted in MLflow; restore it there, or remove {self._state.file}")
        self._marks = high_water(client, run.info.run_id)
        self._next_heartbeat = 0.0  # the first sign also takes back how an earlier attempt ended
        self._client = client

    def _conclude(self) -> None:
        gone = "the process is gone without a last word: killed, or its machine failed"
        if self._watch_pid is None:  # we know nothing but what is written
            gone = "its records end without a last word: killed, or it goes on elsewhere and has told no more yet"
        ending = self._backlog.translator.ending or Ending("KILLED", gone)
        run_id = self._state["run_id"]
        send(self._client, run_id, Upload(tags={"status.cause": ending.cause}))
        # A spool that is sent later ended when its last line was written; a process that is gone, just now.
        end_ms = self._backlog.translator.end_ms if self._watch_pid is None or self._backlog.translator.ending else None
        self._client.set_terminated(run_id, status=ending.status, end_time=end_ms)
        self._is_reported, self.status = True, f"{ending.status} ({ending.cause})"
        self._send_artifacts(
            self._pictures.last(wait_s=PICTURES_S if self._watch_pid is None else self.drain_s), "pictures"
        )

    @property
    def num_known(self) -> int:
        """Records that the server has acknowledged, from any uploader of this folder."""
        return self._backlog.num_known

    @property
    def run_id(self) -> str | None:
        return self._state["run_id"]

    @property
    def experiment(self) -> str:
        return str(self._state["experiment"])

    def _load(self) -> None:
        self._state = state_of(self.run_dir, self.uri, *self._names)
        self._backlog = Backlog(self.run_dir, self._state)

    def _stumble(self, error: Exception) -> None:
        self._client, self._size = None, max(1, self._size // 2)
        if self._fault != cause(error):  # once: a server may be away for weeks
            self._fault = cause(error)
            self._log(traceback.format_exc())

    def _log(self, text: str) -> None:
        with (
            contextlib.suppress(OSError, UserError),
            open(self.run_dir / "tracking.log", "a", opener=places.no_follow) as file,
        ):
            file.write(public(text))

    def _report(self) -> int:
        num_left, where = self._backlog.count_rest(), public(self.uri)
        num_all = num_left + self.num_known
        if self._num_refused:
            tell(f"{where} refused {self._num_refused} records; see {self.run_dir / 'tracking.log'}")
        if self._is_reported:
            return 0
        tell(
            f"{num_left} of {num_all} records are not in MLflow at {where} ({self._fault}); they are kept in "
            f"{self.run_dir}/{MAIN}, and this sends them later: normfree track import "
            f"{shell([str(self.run_dir), '--tracking-uri', where])}"
        )
        return EXIT_NOT_UPLOADED

    def _alive(self) -> bool:
        return self._watch_pid is not None and started_at(self._watch_pid) == self._watch_since is not None
