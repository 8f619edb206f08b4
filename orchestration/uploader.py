"""The loop of the uploader: follow the spool, send what is new, keep account of it, say at the end how the run ended.

See `orchestration.tracking` for what it promises. Imports no MLflow itself: that module is the seam to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import sys
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from orchestration.alive import only_one, started_at
from orchestration.spool import Follower
from orchestration.tracking import connect, experiment_id, missing, resolve_uri, send, write_json
from orchestration.tracking_records import Ending, Translator, Upload, cause, public

MAX_WAIT_S = 15.0
HEARTBEAT_S = 30.0
TOKEN_TAG = "normfree.run"
EXIT_NOT_UPLOADED = 3


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
        drain_s: float = 60.0,
        poll_s: float = 0.5,
        batch_lines: int = 60,
    ) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.uri = resolve_uri(tracking_uri, run_dir)
        self.drain_s, self.poll_s, self.batch_lines = drain_s, poll_s, batch_lines
        self._watch_pid, self._watch_since = watch_pid, started_at(watch_pid)
        self._names = experiment, run_name
        self._client: Any = None
        self._num_single = 0
        """Lines that go one by one, because the server refuses one of them."""
        self._unsure = True
        """A batch may be on the server without our knowing: after a start, and after each failure."""
        self._next_heartbeat = 0.0
        self._num_refused = 0
        self._is_told = False
        """The server knows all records and how the run ended."""
        self._trouble = "the server was not reached"

    def run(self) -> int:
        """0 when all is uploaded, 3 when it is not and the time for it is over."""
        # The uploader of an earlier attempt may still be draining, and two of them would double points.
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock = only_one(self.run_dir / "tracking.lock", self._alive, wait_s=self.drain_s, poll_s=self.poll_s)
        with lock as mine:
            if not mine:
                self._trouble = "another uploader still works on this folder"
            self._load()
            if mine:
                self._save()  # even if no server is ever reached: a later import knows the names
            return self._loop() if mine else self._report()

    def _loop(self) -> int:
        wait_s, next_try, deadline = 0.0, 0.0, float("inf")
        while True:
            alive = self._alive()  # before the poll, so that the last words of a process now gone are read
            self._poll()
            over = not alive or self._translator.ending is not None
            now = time.monotonic()
            if over and deadline == float("inf"):
                deadline, next_try = now + self.drain_s, now
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
        """One batch to the server; False if none is left, and then the run's ending has been told if it is `over`."""
        if self._client is None:
            self._open(over)
        if not self._pending:
            if over:
                self._conclude()
            elif time.monotonic() >= self._next_heartbeat:
                # If this machine dies, nobody is left to say so; an old time in this tag says it.
                send(self._client, self._state["run_id"], Upload(tags={"heartbeat_s": str(round(time.time()))}))
                self._next_heartbeat = time.monotonic() + HEARTBEAT_S
            return False
        size = 1 if self._num_single else self.batch_lines
        batch = [self._pending[i] for i in range(min(size, len(self._pending)))]
        self._send([upload for _, upload in batch])
        for _ in batch:
            self._pending.popleft()
        self._num_single = max(0, self._num_single - 1)
        self._state["acknowledged"] = batch[-1][0] + 1
        self._save()
        return True

    def _send(self, uploads: list[Upload]) -> None:
        whole = Upload()
        for upload in uploads:
            whole.merge(upload)
        run_id = self._state["run_id"]
        if self._unsure:
            whole.points = missing(self._client, run_id, whole.points)
        try:
            send(self._client, run_id, whole)
        except Exception as error:
            if getattr(error, "error_code", "") not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            # The server will never take this. Find the line that it minds, and let the others through.
            self._unsure = True
            if len(uploads) > 1:
                self._num_single = len(uploads)
                raise
            self._num_refused += 1
            self._log(traceback.format_exc())
            return
        self._unsure = False
        if whole.config is not None:
            self._send_config(whole.config)

    def _send_config(self, config: dict[str, Any]) -> None:
        """The resolved configuration as an artifact. Artifacts have a store of their own, which may fail alone."""
        run_id, file = self._state["run_id"], self.run_dir / "run.yaml"
        try:
            if file.exists():
                self._client.log_artifact(run_id, str(file))
            else:
                self._client.log_dict(run_id, config, "run.json")
        except Exception as error:
            self._log(traceback.format_exc())
            send(self._client, run_id, Upload(tags={"artifact_error": cause(error)}))

    def _open(self, over: bool) -> None:
        """Connect, and find the run on the server or make it. Safe to be killed in at any place."""
        client = connect(self.uri)
        run = None
        experiment = experiment_id(client, self.uri, self._state["experiment"])
        if self._state["run_id"] is None:
            # A run that was made just before we were killed carries our token, which was on disk before.
            self._save()
            mark = f"tags.`{TOKEN_TAG}` = '{self._state['token']}'"
            run = next(iter(client.search_runs([experiment], mark, max_results=1)), None)
            run = run or client.create_run(
                experiment, tags={TOKEN_TAG: self._state["token"]}, run_name=self._state["run_name"]
            )
            self._state["run_id"] = run.info.run_id
            self._save()
        else:
            try:
                run = client.get_run(self._state["run_id"])
            except Exception as error:
                if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                    # The server answers and has lost the run (a new database): tell it everything again.
                    self._state.update(run_id=None, acknowledged=0)
                    self._save()
                    self._rewind()
                raise
        if run.info.lifecycle_stage != "active":
            raise RuntimeError(f"its run was deleted in MLflow; restore it there, or remove {self._state_file}")
        if run.info.status != "RUNNING" and not over:
            client.update_run(run.info.run_id, status="RUNNING")
        self._client = client

    def _conclude(self) -> None:
        gone = Ending("KILLED", "the process is gone without a last word: killed, or its machine failed")
        ending = self._translator.ending or gone
        run_id = self._state["run_id"]
        send(self._client, run_id, Upload(tags={"status.cause": ending.cause}))
        self._client.set_terminated(run_id, status=ending.status)
        self._is_told = True

    def _poll(self) -> None:
        for line in self._follower.poll():
            upload = self._translator.translate(line.value)
            if line.number >= self._state["acknowledged"]:
                self._pending.append((line.number, upload))

    def _rewind(self) -> None:
        self._follower = Follower(self.run_dir / "records.jsonl")
        self._translator = Translator()
        self._pending: deque[tuple[int, Upload]] = deque()

    def _load(self) -> None:
        self._state_file = self.run_dir / "tracking.json"
        self._states = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
        # By the server's public name, with "." for the run folder, which may be moved: a spool can go to many servers.
        target = public(self.uri).replace(str(self.run_dir), ".")
        fresh = {"run_id": None, "token": secrets.token_hex(8), "acknowledged": 0}
        self._state: dict[str, Any] = self._states.setdefault(target, fresh)
        experiment, run_name = self._names
        self._state["experiment"] = experiment or self._state.get("experiment") or "normfree"
        self._state["run_name"] = run_name or self._state.get("run_name") or self.run_dir.name
        self._rewind()

    def _save(self) -> None:
        write_json(self._state_file, self._states)

    def _stumble(self, error: Exception) -> None:
        self._unsure, self._client = True, None
        if self._trouble != cause(error):  # once: a server may be away for weeks
            self._trouble = cause(error)
            self._log(traceback.format_exc())

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError), (self.run_dir / "tracking.log").open("a") as file:
            file.write(public(text))

    def _report(self) -> int:
        self._poll()
        num_all = self._state["acknowledged"] + len(self._pending)
        where = public(self.uri)
        if self._num_refused:
            log = self.run_dir / "tracking.log"
            print(f"tracking: {where} refused {self._num_refused} records; see {log}", file=sys.stderr)
        if self._is_told:
            return 0
        print(
            f"tracking: {len(self._pending)} of {num_all} records are not in MLflow at {where} ({self._trouble}); they "
            f"are kept in {self.run_dir}/records.jsonl, and this sends them later: python -m orchestration.tracking "
            f"{shlex.quote(str(self.run_dir))} --tracking-uri {shlex.quote(where)}",
            file=sys.stderr,
        )
        return EXIT_NOT_UPLOADED

    def _alive(self) -> bool:
        return self._watch_pid is not None and started_at(self._watch_pid) == self._watch_since is not None
