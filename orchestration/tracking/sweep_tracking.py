"""A sweep in MLflow: one parent run, one child run a trial, each logged once however often the driver starts.

The driver calls this from its own process, so every call gives up within seconds, and nothing that MLflow does or does
not do reaches the sweep: a failed call is kept, tried again later, and reported in one line at the end. The sweep's own
ledger is the truth; a driver that starts again hands over its finished trials again, and those already there are
recognised by their digest.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from orchestration.spool.state_file import ServerState, tell
from orchestration.tracking import heartbeat, lineage
from orchestration.tracking.lineage import Origin
from orchestration.tracking.mlflow_client import (
    connect,
    experiment_id,
    find_run,
    missing,
    open_run,
    send,
    send_datasets,
    send_file,
)
from orchestration.tracking.tracking_uri import resolve_uri, server_name
from orchestration.tracking.upload import DatasetUsed, Point, Upload, cause, points_of, shorten
from pipeline.errors import UserError
from pipeline.secrets import public

PARENT_TAG = "mlflow.parentRunId"  # MLflow's own name: its pages fold children under this run
DIGEST_TAG = "normfree.trial"
SWEEP_TAG = "normfree.sweep"
STATUS = {"ok": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
FIRST_PAUSE_S, LAST_PAUSE_S = 5.0, 300.0


@dataclass(frozen=True)
class _Child:
    digest: str
    name: str
    status: str
    upload: Upload = field(repr=False)


class SweepTracker:
    """`child` for every finished trial, `parent_summary` when there is something to sum up, `close` at the end.

    `sweep_dir` is a local folder that holds `tracking.json`; with `tracking_uri` None also the SQLite file. `token` is how
    other machines know the sweep too, `begin_s` (Unix) when it began. Raises UserError for a URI that MLflow would not
    take, and nothing else ever.
    """

    def __init__(
        self,
        tracking_uri: str | None,
        experiment: str,
        name: str,
        sweep_dir: str | Path,
        *,
        token: str | None = None,
        begin_s: float | None = None,
    ) -> None:
        self.uri = resolve_uri(tracking_uri, sweep_dir)
        self.num_failures = 0
        self._experiment, self._name = experiment, name
        self._begin_ms = None if begin_s is None else round(1000 * begin_s)
        folder = Path(sweep_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        fresh: dict[str, Any] = {"run_id": None, "token": token or secrets.token_hex(8), "children": {}}
        self._state = ServerState(folder / "tracking.json", server_name(self.uri, folder), fresh)
        self._client: Any = None
        self._waiting: dict[str, _Child] = {}
        self._summary: tuple[Upload, list[Path], dict[str, str]] | None = None
        self._origins: dict[str, Origin] = {}
        self._pause_s, self._not_before = 0.0, 0.0
        self._fault = ""
        self._beats: threading.Thread | None = None
        self._end = threading.Event()

    def child(
        self,
        trial_digest: str,
        name: str,
        params: dict[str, Any],
        metrics_history: Sequence[dict[str, float]],
        final: dict[str, float],
        tags: dict[str, str],
        status: str,
        datasets: Sequence[DatasetUsed] = (),
    ) -> None:
        """One finished trial; `status` is ok or failed. Rows of history hold `step`, `time_s` (Unix) and any floats."""
        if trial_digest in self._state["children"]:
            return
        now_s = float(metrics_history[-1]["time_s"]) if metrics_history else time.time()
        last = int(metrics_history[-1]["step"]) if metrics_history else 0
        points = [p for row in metrics_history for p in _points(row, int(row["step"]), float(row["time_s"]))]
        points += _points({f"final/{k}": v for k, v in final.items()}, last, now_s)
        upload = _upload(points, params, tags)
        upload.datasets = list(datasets)
        self._waiting[trial_digest] = _Child(trial_digest, name, STATUS.get(status, status), upload)
        self._send_waiting()

    def parent_summary(
        self,
        params: dict[str, Any],
        metrics: dict[str, float],
        artifacts: Sequence[Path],
        tags: Mapping[str, str] | None = None,
        *,
        checkpoints: Mapping[str, str] | None = None,
    ) -> None:
        """What the sweep as a whole says: parameters (write-once), metrics, files such as the scorecard, and tags.

        `checkpoints` (digest -> URL) are those that it is about; their runs are linked with it, both ways.
        """
        upload = _upload(_points(metrics, 0, time.time()), params, tags or {})
        self._summary = upload, list(artifacts), dict(checkpoints or {})
        self._send_waiting()

    def close(self, status: str, end_s: float | None = None) -> bool:
        """Sends what waits and ends the parent run (`status` as in `child`, or killed); False and one line if not all arrived.

        `end_s` (Unix): when it ended, now by default.
        """
        self._not_before = 0.0  # a last try, at once
        self._send_waiting()
        self._end.set()
        if self._beats is not None:
            self._beats.join(10.0)  # a late sign would take back the ending
        if not self._waiting and self._summary is None:
            with self._guarded():
                self._connect()
                end_ms = None if end_s is None else round(1000 * end_s)
                self._client.set_terminated(self._state["run_id"], status=STATUS.get(status, status), end_time=end_ms)
                return True
        kept = f"{len(self._waiting)} trials" + (" and the summary" if self._summary else "")
        tell(
            f"{kept} are not in MLflow at {public(self.uri)} ({self._fault}; {self.num_failures} calls failed); they are in "
            "the sweep's ledger, and running the same command again sends them"
        )
        return False

    def _send_waiting(self) -> None:
        if time.monotonic() < self._not_before:
            return  # a dead server is asked again after a pause, not once a trial
        with self._guarded():
            self._connect()
            for child in list(self._waiting.values()):
                self._log_child(child)
                del self._waiting[child.digest]
            if self._summary is not None:
                self._log_summary(*self._summary)
                self._summary = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: telemetry is lost for now, and the sweep goes on
            self.num_failures += 1
            self._client = None
            self._fault = cause(error)
            self._pause_s = min(LAST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
            self._not_before = time.monotonic() + self._pause_s
        else:
            self._pause_s, self._not_before = 0.0, 0.0

    def _connect(self) -> None:
        if self._client is not None:
            return
        client = connect(self.uri)
        experiment = self._state["experiment_id"] = experiment_id(client, self.uri, self._experiment)
        run = open_run(
            client,
            self._state,
            experiment,
            tag=SWEEP_TAG,
            run_name=self._name,
            begin_ms=self._begin_ms,
            fresh={"children": {}},
        )
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self._client = client
        if self._beats is None:  # a killed driver can say nothing any more; others see that its signs stopped
            arguments = partial(connect, self.uri), self._state["run_id"], self._end
            self._beats = threading.Thread(target=heartbeat.keep_beating, args=arguments, daemon=True)
            self._beats.start()

    def _log_child(self, child: _Child) -> None:
        client, parent, experiment = self._client, self._state["run_id"], self._state["experiment_id"]
        # A driver killed between the server and tracking.json leaves a child that only its digest tells from a new one.
        also = f" AND tags.`{PARENT_TAG}` = '{parent}'"
        run = find_run(client, experiment, DIGEST_TAG, child.digest, also)
        upload = child.upload
        if run is None:
            tags = {DIGEST_TAG: child.digest, PARENT_TAG: parent}
            if digest := upload.tags.get("checkpoint_digest"):
                tags |= self._origin(digest, upload.tags.get("checkpoint_url", "")).tags
            start_ms = min((p.time_ms for p in upload.points), default=None)
            run = client.create_run(experiment, tags=tags, run_name=child.name, start_time=start_ms)
        elif run.info.status == "RUNNING":
            points = missing(client, run.info.run_id, upload.points)
            upload = Upload(points=points, params=upload.params, tags=upload.tags)
        if run.info.status == "RUNNING":
            send(client, run.info.run_id, upload)
            send_datasets(client, run.info.run_id, child.upload.datasets)
            end_ms = max((p.time_ms for p in child.upload.points), default=None)
            client.set_terminated(run.info.run_id, status=child.status, end_time=end_ms)
        self._state["children"][child.digest] = run.info.run_id
        self._state.save()

    def _log_summary(self, upload: Upload, artifacts: list[Path], checkpoints: dict[str, str]) -> None:
        run_id = self._state["run_id"]
        # The same sweep, extended, sums up again: parameters that differ by then become tags (they are write-once).
        data = self._client.get_run(run_id).data
        have = data.params
        changed = {f"latest.{k}": v for k, v in upload.params.items() if have.get(k, v) != v}
        params = {k: v for k, v in upload.params.items() if k not in have}
        points = [p for p in upload.points if data.metrics.get(p.key) != p.value]  # an import again says nothing new
        tags = {**upload.tags, **changed}
        if origins := [self._origin(digest, url) for digest, url in checkpoints.items()]:
            tags |= lineage.merged(origins)
        send(self._client, run_id, Upload(points=points, params=params, tags=tags))
        if "status.cause" in data.tags and "status.cause" not in tags:  # it had not come to its end
            self._client.delete_tag(run_id, "status.cause")
        for digest, origin in zip(checkpoints, origins, strict=True):
            lineage.link_back(self._client, origin, digest, run_id, tags.get("sweep_dir", self._name))
        for path in artifacts:
            if path.exists():
                try:  # reports lie in a folder of the sweep's
                    send_file(self._client, run_id, path.parent.parent, path)
                except UserError as error:
                    tell(f"a file is not sent: {error}")

    def _origin(self, digest: str, url: str) -> Origin:
        """Origin of these weights; asked once."""
        if digest not in self._origins:
            self._origins[digest] = lineage.origin(self._client, digest, url)
        return self._origins[digest]


def _upload(points: list[Point], params: Mapping[str, Any], tags: Mapping[str, str]) -> Upload:
    """As MLflow takes them, without passwords."""
    return Upload(
        points=points,
        params={k: public(str(v))[:500] for k, v in params.items()},
        tags={k: shorten(public(str(v))) for k, v in tags.items()},
    )


def _points(values: dict[str, float], step: int, time_s: float) -> list[Point]:
    return points_of({"step": step, "time_s": time_s}, {k: v for k, v in values.items() if k not in ("step", "time_s")})
