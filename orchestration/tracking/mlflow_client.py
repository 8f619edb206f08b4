"""From a run's spool to MLflow: one run on the server, each point exactly once, a status that is true.

The trainer writes its records into the spool (`orchestration.spool.spool`) and never speaks to MLflow. A process of its own
(`orchestration.tracking.start_uploader`) follows the spool and sends. What is acknowledged stands in `<run_dir>/tracking.json`,
so killing either process at any moment, restarting the run or losing the server loses nothing and doubles nothing.

How "exactly once" is reached: lines are sent in order, and after a start or a failure the server is asked for the last step
that it has of each metric (`high_water`); a request that the server finishes only after we gave up on it repeats points that
are equal in key, step, time and value, which its primary key holds apart from doubles.

Offline machines: `normfree track import RUN --tracking-uri URI` sends a spool later, to any server.
"""

import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestration.spool.state_file import ServerState
from orchestration.tracking import heartbeat
from orchestration.tracking.tracking_uri import make_sqlite, sqlite_file
from orchestration.tracking.upload import DatasetUsed, Point, Upload
from pipeline import places
from pipeline.errors import UserError

DEFAULT_EXPERIMENT = "0"
"""That MLflow makes of itself, and nobody here uses."""
DATASET_DIGITS = 36  # of a digest, as MLflow stores it
DRAIN_S = 30.0
"""How long an uploader goes on trying after its run has ended."""
KIND = {
    "mlflow.experimentKind": "custom_model_development"
}  # else MLflow's pages show runs as evaluations of chat bots
BATCH_POINTS = 900  # the server takes 1,000 metrics, parameters and tags together in one request


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
    """The experiment of this name, made if it is not there. Artifacts of a SQLite store lie next to its file."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise UserError(f"the experiment {name!r} was deleted in MLflow; restore it there, or use another name")
        for key, value in KIND.items():  # of an experiment that somebody made in the pages, or an earlier version did
            if key not in found.tags:
                client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)
    file = sqlite_file(tracking_uri)  # MLflow's own choice would be ./mlruns of whatever folder we run in
    location = (file.parent / "mlflow-artifacts" / re.sub(r"[^\w.-]", "_", name)).as_uri() if file else None
    return str(client.create_experiment(name, artifact_location=location, tags=KIND))


def first_page(client: Any) -> str:
    """Where MLflow's pages show training: the one experiment, or the list of them, as what comes after the server's address.

    MLflow 3.17 takes the kind of its pages from the address, or from what the browser chose before (language models where it
    chose nothing), and the experiment's own tag only where that way of moving about is switched off.
    """
    found = [one for one in client.search_experiments(max_results=100) if one.experiment_id != DEFAULT_EXPERIMENT]
    place = f"/{found[0].experiment_id}/runs" if len(found) == 1 else ""
    return f"#/experiments{place}?workflowType=machine_learning"


def find_run(client: Any, experiment: str, tag: str, value: str, also: str = "") -> Any:
    """The run with this tag, else None. `also`: more of MLflow's filter."""
    found = client.search_runs([experiment], f"tags.`{tag}` = '{value}'{also}", max_results=1)
    return next(iter(found), None)


def open_run(
    client: Any,
    state: ServerState,
    experiment: str,
    *,
    tag: str,
    run_name: str,
    begin_ms: int | None,
    fresh: dict[str, Any],
) -> Any:
    """The run of `state` on the server, found or made. Safe to be killed in at any place.

    Args:
        tag: of the token by which a run is known that was made just before a kill.
        fresh: what `state` holds of a server that has nothing. It is put back, and MLflow's error raised, where the server
            answers and has lost the run (a new database): everything must be sent again.
    """
    state["experiment_id"] = experiment
    if state["run_id"] is None:
        state.save()  # the token, before a run that carries it can exist
        tags = {tag: state["token"], **heartbeat.beat_now()}
        run = find_run(client, experiment, tag, state["token"])
        run = run or client.create_run(experiment, tags=tags, run_name=run_name, start_time=begin_ms)
        state["run_id"] = run.info.run_id
        state.save()
        return run
    try:
        return client.get_run(state["run_id"])
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            state.update(fresh, run_id=None)
            state.save()
        raise


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


def server_version(tracking_uri: str) -> str:
    """What answers there, with its version; what the request raises where nothing does."""
    if not tracking_uri.startswith(("http://", "https://")):
        return f"a database, by MLflow {importlib.metadata.version('mlflow')}"
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(get_default_host_creds(tracking_uri), "/version", "GET")
    return (
        f"MLflow {answer.text.strip()[:40]}" if answer.ok else f"a server that says {answer.status_code} of its version"
    )
