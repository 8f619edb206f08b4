"""From a run's spool to MLflow: one run on the server, each point exactly once, a status that is true.

The trainer writes its records into the spool (`orchestration.spool.spool`) and never speaks to MLflow. A process of its own,
started by `start_uploader`, follows the spool and sends. What is acknowledged stands in `<run_dir>/tracking.json`, so
killing either process at any moment, restarting the run or losing the server loses nothing and doubles nothing.

How "exactly once" is reached: lines are sent in order, and after a start or a failure the server is asked for the last step
that it has of each metric (`high_water`); a request that the server finishes only after we gave up on it repeats points that
are equal in key, step, time and value, which its primary key holds apart from doubles.

Offline machines: `normfree track import RUN --tracking-uri URI` sends a spool later, to any server.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration import child_process
from orchestration.tracking.tracking_uri import make_sqlite, resolve_uri, sqlite_file
from orchestration.tracking.translate import DatasetUsed, Point, Upload, public
from pipeline import places
from pipeline.display import terminal
from pipeline.errors import UserError

DATASET_DIGITS = 36  # of a digest, as MLflow stores it
DRAIN_S = 30.0
KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # else MLflow's pages show runs as evaluations of chat bots
BATCH_POINTS = 900  # the server takes 1,000 metrics, parameters and tags together in one request


def start_uploader(
    run_dir: str | os.PathLike[str],
    tracking_uri: str | None = None,
    *,
    experiment: str,
    run_name: str,
    drain_s: float = DRAIN_S,
    mirror: str | None = None,
) -> subprocess.Popen[bytes]:
    """The process that uploads `run_dir`'s spool for as long as this process lives; open the Spool before.

    It ends by itself: 0 when everything is there, 3 when `drain_s` seconds after the run's end something is not, which
    it says in one line on stderr. With `mirror`, an object-store folder, the spool is copied there as it grows
    (`orchestration.spool.mirror`). `tracking_uri` None means SQLite in the run folder. UserError for a URI that
    MLflow would not take.
    """
    uri = resolve_uri(tracking_uri, run_dir)
    words = [os.path.abspath(run_dir), "--watch-pid", str(os.getpid())]
    words += ["--experiment", experiment, "--run-name", run_name, "--drain-s", str(drain_s)]
    words += ["--mirror", mirror] if mirror else []
    # A session of its own: Ctrl-C in the terminal stops the trainer, whose last words must still be uploaded. The URI goes by
    # the environment: it may hold a password.
    return child_process.start(
        "orchestration.tracking.mlflow_client",
        words,
        environment={"MLFLOW_TRACKING_URI": uri},
        on_parent_death=None,
        own_session=True,
    )


def connect(tracking_uri: str) -> Any:
    """An MlflowClient that gives up after seconds; the defaults hold a call to a dead server for 246 s (M2)."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    make_sqlite(tracking_uri)
    return MlflowClient(tracking_uri)


def hurry(timeout_s: float) -> None:
    """From here on a call gives up after `timeout_s` at the latest, without a second try: somebody waits for us to end."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    known_s = float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"))
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(1, round(min(timeout_s, known_s))))


def experiment_id(client: Any, tracking_uri: str, name: str) -> str:
    """The experiment of this name, made if it is not there. Artifacts of a SQLite store lie beside its file."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise UserError(f"the experiment {name!r} was deleted in MLflow; restore it there, or use another name")
        return str(found.experiment_id)
    file = sqlite_file(tracking_uri)  # MLflow's own choice would be ./mlruns of whatever folder we run in
    location = (file.parent / "mlflow-artifacts" / re.sub(r"[^\w.-]", "_", name)).as_uri() if file else None
    return str(client.create_experiment(name, artifact_location=location, tags=KIND))


def send(client: Any, run_id: str, upload: Upload) -> None:
    """Points, parameters and tags to one run, in as many requests as the server's limit asks for."""
    from mlflow.entities import Metric, Param, RunTag

    rest = [RunTag(k, v) for k, v in upload.tags.items()], [Param(k, v) for k, v in upload.params.items()]
    if any(rest):
        client.log_batch(run_id, tags=rest[0], params=rest[1])
    for start in range(0, len(upload.points), BATCH_POINTS):
        chunk = upload.points[start : start + BATCH_POINTS]
        client.log_batch(run_id, metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in chunk])


def send_file(client: Any, run_id: str, root: Path, file: Path, folder: str | None = None) -> None:
    """`file`, which lies below `root`, as an artifact of the run.

    Raises:
        UserError: it, or a folder on the way, is a link: what somebody else has made may link to a file of ours.
    """
    os.close(places.open_below(root, str(file.relative_to(root)), os.O_RDONLY, f"the folder {root}"))
    client.log_artifact(run_id, str(file), folder)


def high_water(client: Any, run_id: str) -> dict[str, int]:
    """The last step that the server has of each metric, in one request however long the run is.

    A spool's points are sent in order and each key's steps only rise, so what is not above this line has arrived.
    """
    latest = client.get_run(run_id).data._metric_objs  # the only place where MLflow's client gives the step as well
    return {metric.key: int(metric.step) for metric in latest}


def missing(client: Any, run_id: str, points: Sequence[Point]) -> list[Point]:
    """Those points that the server does not have yet, by key, step and time, in any order."""
    have = {
        (key, m.step, m.timestamp) for key in {p.key for p in points} for m in client.get_metric_history(run_id, key)
    }
    return [p for p in points if (p.key, p.step, p.time_ms) not in have]


def send_datasets(client: Any, run_id: str, datasets: Sequence[DatasetUsed]) -> None:
    """As inputs of the run: MLflow's pages show them, and runs can be searched by them. Saying it again changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for used in datasets:
        source = json.dumps({"uri": used.url})
        dataset = Dataset(used.name[:500], used.digest[:DATASET_DIGITS], "webdataset", source)
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", used.use)])])


def main(arguments: Sequence[str] | None = None) -> int:
    """The uploader's process: 0 all is there, 2 a mistake of the user, 3 something is not uploaded."""
    from orchestration.tracking.uploader import Uploader

    parser = argparse.ArgumentParser(prog="python -m orchestration.tracking.mlflow_client", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else RUN_DIR/mlflow.db")
    parser.add_argument("--experiment", help="default: the one of the run's last upload, else normfree")
    parser.add_argument("--run-name", help="default: the one of the run's last upload, else the folder's name")
    parser.add_argument("--watch-pid", type=int, metavar="PID", help="follow the spool while this process lives")
    parser.add_argument("--drain-s", type=float, default=DRAIN_S, help="how long to try after the run's end")
    parser.add_argument("--mirror", metavar="URL", help="copy the spool to this object-store folder as it grows")
    args = parser.parse_args(arguments)
    try:
        if not (Path(args.run_dir) / "records.jsonl").exists() and args.watch_pid is None:
            raise UserError(f"no records in {args.run_dir} (records.jsonl is missing); give the folder of a run")
        uri = resolve_uri(args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), args.run_dir)
        names = {"experiment": args.experiment, "run_name": args.run_name, "mirror": args.mirror}
        os.nice(10)  # the steps of the training come first
        return Uploader(args.run_dir, uri, **names, watch_pid=args.watch_pid, drain_s=args.drain_s).run()
    except UserError as error:
        print(terminal(f"tracking: {public(str(error))}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
