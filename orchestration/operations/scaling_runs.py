"""Finished pretraining runs on a tracker, as points of loss against compute."""

import re
from typing import Any

from pipeline.errors import UserError
from pipeline.planning.scaling import FinishedRun

PAGE = 1000
FINISHED = "attributes.status = 'FINISHED' and params.num_parameters != ''"


def from_tracker(tracking_uri: str) -> list[FinishedRun]:
    """Of every experiment: runs that ended well and were evaluated; compute is parameters times epochs.

    Raises:
        UserError: there is none.
    """
    from orchestration.tracking.heartbeat import all_experiments, pages
    from orchestration.tracking.mlflow_client import connect

    client = connect(tracking_uri)
    experiments = all_experiments(client)
    runs = pages(lambda **page: client.search_runs(experiments, FINISHED, max_results=PAGE, **page))
    found = [point for run in runs if (point := _point(run)) is not None]
    if not found:
        raise UserError(
            f"{tracking_uri} has no finished pretraining run with an evaluation; give another tracker, or a file"
        )
    return found


def _point(run: Any) -> FinishedRun | None:
    metrics, params = run.data.metrics, run.data.params
    losses = [v for k, v in sorted(metrics.items()) if re.fullmatch(r"eval/[^/]+/loss", k)]
    try:
        parameters, epochs = float(params["num_parameters"]), float(metrics["train/epoch"])
    except (KeyError, ValueError):  # of another program, or a sweep's
        return None
    if not losses or min(parameters, epochs, losses[0]) <= 0:
        return None
    return FinishedRun(
        name=str(run.info.run_name or run.info.run_id),
        parameters=parameters,
        epochs=epochs,
        loss=float(losses[0]),
        compute=parameters * epochs,
    )
