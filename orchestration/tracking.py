"""From a run's spool to MLflow: one run on the server, each point exactly once, a status that is true.

The trainer writes its records into the spool (`orchestration.spool`) and never speaks to MLflow. A process of its own,
started by `start_uploader`, follows the spool and sends. What is acknowledged stands in `<run_dir>/tracking.json`, so
killing either process at any moment, restarting the run or losing the server loses nothing and doubles nothing.

Offline machines: `python -m orchestration.tracking RUN_DIR --tracking-uri URI` sends a spool later, as often as you like.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import secrets
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.spool import Follower, Line
from orchestration.tracking_records import Ending, Point, Translator, Upload, public
from pipeline.errors import UserError

BATCH_POINTS = 900  # the server takes 1,000 metrics, parameters and tags together in one request
MAX_WAIT_S = 15.0
HEARTBEAT_S = 30.0
TOKEN_TAG = "normfree.run"
EXIT_NOT_UPLOADED = 3


def start_uploader(
    run_dir: str | os.PathLike[str],
    tracking_uri: str | None = None,
    *,
    experiment: str,
    run_name: str,
    drain_s: float = 60.0,
) -> subprocess.Popen[bytes]:
    """The process that uploads `run_dir`'s spool for as long as this process lives; open the Spool before.

    It ends by itself: 0 when everything is there, 3 when `drain_s` seconds after the run's end something is not, which
    it says in one line on stderr. `tracking_uri` None means SQLite in the run folder. UserError for a URI that
    MLflow would not take.
    """
    uri = resolve_uri(tracking_uri, run_dir)
    root = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {
        # By the environment, for a URI may hold a password and every user of the machine can read command lines.
        "MLFLOW_TRACKING_URI": uri,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, "-m", "orchestration.tracking", os.fspath(run_dir), "--watch-pid", str(os.getpid())]
    command += ["--experiment", experiment, "--run-name", run_name, "--drain-s", str(drain_s)]
    # A session of its own: Ctrl-C in the terminal stops the trainer, whose last words must still be uploaded.
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def resolve_uri(tracking_uri: str | None, run_dir: str | os.PathLike[str]) -> str:
    """The tracking URI to use, SQLite in `run_dir` for None. UserError for a folder, which MLflow 3 refuses (M1)."""
    if not tracking_uri:
        return f"sqlite:///{Path(run_dir).resolve() / 'mlflow.db'}"
    if tracking_uri != "databricks" and (
        not re.match(r"[a-z][a-z0-9+.-]*:", tracking_uri, re.I) or tracking_uri.startswith("file:")
    ):
        folder = Path(tracking_uri.removeprefix("file://")).expanduser().resolve()
        raise UserError(
            f"the tracking URI {tracking_uri!r} is a folder, and MLflow keeps runs in folders no more; "
            f"write sqlite:///{folder / 'mlflow.db'}, or the address of a server (http://HOST:5000)"
        )
    return tracking_uri


def connect(tracking_uri: str) -> Any:
    """An MlflowClient that gives up after seconds; the defaults hold a call to a dead server for 246 s (M2)."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    file = sqlite_file(tracking_uri)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri)


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file behind a `sqlite:///` URI, None for any other URI."""
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", tracking_uri)
    return Path(match[1]).resolve() if match else None


def experiment_id(client: Any, tracking_uri: str, name: str) -> str:
    """The experiment of this name, made if it is not there. Artifacts of a SQLite store lie beside its file."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise UserError(f"the experiment {name!r} was deleted in MLflow; restore it there, or use another name")
        return str(found.experiment_id)
    file = sqlite_file(tracking_uri)  # MLflow's own choice would be ./mlruns of whatever folder we run in
    location = (file.parent / "mlflow-artifacts" / re.sub(r"[^\w.-]", "_", name)).as_uri() if file else None
    return str(client.create_experiment(name, artifact_location=location))


def send(client: Any, run_id: str, upload: Upload) -> None:
    """Points, parameters and tags to one run, in as many requests as the server's limit asks for."""
    from mlflow.entities import Metric, Param, RunTag

    rest = [RunTag(k, v) for k, v in upload.tags.items()], [Param(k, v) for k, v in upload.params.items()]
    if any(rest):
        client.log_batch(run_id, tags=rest[0], params=rest[1])
    for start in range(0, len(upload.points), BATCH_POINTS):
        chunk = upload.points[start : start + BATCH_POINTS]
        client.log_batch(run_id, metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in chunk])


def missing(client: Any, run_id: str, points: Sequence[Point]) -> list[Point]:
    """Those points that the server does not have yet, by key, step and time."""
    have = {
        (key, m.step, m.timestamp) for key in {p.key for p in points} for m in client.get_metric_history(run_id, key)
    }
    return [p for p in points if (p.key, p.step, p.time_ms) not in have]


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` at once: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


class Uploader:
    """Sends the spool of `run_dir` until the run is over and everything is there."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        tracking_uri: str,
        *,
        experiment: str | None = None,
        run_name: str | None = None,
        watch_pid: int | None = None,
        drain_s: float = 60.0,
        poll_s: float = 0.5,
        batch_lines: int = 60,
    ) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.uri = tracking_uri
        self.drain_s, self.poll_s, self.batch_lines = drain_s, poll_s, batch_lines
        self._watch_pid, self._watch_since = watch_pid, _started_at(watch_pid)
        self._state_file = self.run_dir / "tracking.json"
        # By the server's public name, "." for the run folder, which may be moved: one spool can go to several servers.
        self._target = public(tracking_uri).replace(str(self.run_dir), ".")
        self._states: dict[str, Any] = json.loads(self._state_file.read_text()) if self._state_file.exists() else {}
        fresh = {"run_id": None, "token": secrets.token_hex(8), "acknowledged": 0}
        self._state = self._states.setdefault(self._target, fresh)
        self._state["experiment"] = experiment or self._state.get("experiment") or "normfree"
        self._state["run_name"] = run_name or self._state.get("run_name") or self.run_dir.name
        self._follower = Follower(self.run_dir / "records.jsonl")
        self._sent = Translator()
        self._seen = Translator()
        """Ahead of `_sent`: knows that the run has ended although the server does not answer."""
        self._pending: deque[Line] = deque()
        self._client: Any = None
        self._unsure = True
        """A batch may be on the server without our knowing: after a start and after each failure."""
        self._next_heartbeat = 0.0
        self._num_refused = 0
        self._trouble = "the server was not reached"

    def run(self) -> int:
        """0 when all is uploaded, 3 when it is not and the time for it is over."""
        wait_s, next_try, deadline = 0.0, 0.0, None
        while True:
            alive = self._alive()  # before the poll, so that the last words of a process now gone are read
            self._poll()
            over = not alive or self._seen.ending is not None
            now = time.monotonic()
            if over and deadline is None:
                deadline, next_try = now + self.drain_s, now
            if now >= next_try:
                try:
                    progressed = self._step(over)
                    wait_s = 0.0
                    if over and not self._pending:
                        self._conclude()
                        return self._report()
                    if progressed:
                        # Somebody waits for a live run's uploader; nobody for an import, as long as it moves.
                        deadline = now + self.drain_s if deadline and self._watch_pid is None else deadline
                        if deadline is None or now < deadline:
                            continue
                except Exception as error:
                    self._failed(error)
                    wait_s = min(MAX_WAIT_S, max(0.5, 2 * wait_s), self.drain_s / 4)
                    next_try = now + wait_s
            if deadline is not None and now >= deadline:
                return self._report()
            time.sleep(self.poll_s)

    def _poll(self) -> None:
        for line in self._follower.poll():
            self._seen.translate(line.value)
            if line.number < self._state["acknowledged"]:
                self._sent.translate(line.value)
            else:
                self._pending.append(line)

    def _step(self, over: bool) -> bool:
        """One batch; True if there was one."""
        if self._client is None:
            self._open(over)
        if not self._pending:
            if not over and time.monotonic() >= self._next_heartbeat:
                self._heartbeat()
            return False
        lines = [self._pending[i] for i in range(min(self.batch_lines, len(self._pending)))]
        self._send(lines)
        for _ in lines:
            self._pending.popleft()
        self._state["acknowledged"] = lines[-1].number + 1
        self._save()
        return True
