"""`normfree plan --scaling TRACKER` against a real MLflow: which of its runs become points."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.operations import scaling_runs
from orchestration.spool.spool import Spool
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.uploader import Uploader
from pipeline.records import Evaluation, Record, Stopped
from tests.orchestration.tracking.test_tracking import empty_database, finished, started, step

pytestmark = pytest.mark.slow
__all__ = ["empty_database"]
SIZES = (1e6, 2e6, 4e6, 8e6, 16e6)
EPOCHS, SLOPE = 3.0, -0.1
"""Compute is size times epochs, so that of the line is the size's own."""


def loss_of(size: float) -> float:
    return 4.0 * (size * EPOCHS) ** SLOPE


def record(folder: Path, uri: str, size: float, end: Record, *, is_evaluated: bool = True) -> None:
    points = [dataclasses.replace(step(number), epoch=number * EPOCHS / 2) for number in (1, 2)]
    scored = Evaluation(
        step=2, split="val", weights="ema", loss=loss_of(size), top1=0.5, top5=0.9, num_samples=10, seconds_s=1.0
    )
    with Spool(folder / "records.jsonl") as spool:
        spool.append(dataclasses.replace(started(), num_parameters=int(size)))
        for each in (*points, *([scored] if is_evaluated else []), end):
            spool.append(each)
    assert Uploader(folder, uri, experiment="pretrain", run_name=folder.name, poll_s=0.02, drain_s=60.0).run() == 0


def test_finished_runs_with_an_evaluation_are_points_and_no_others(
    tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_database, tmp_path / "all.db")
    uri = f"sqlite:///{tmp_path}/all.db"
    for size in SIZES:
        record(tmp_path / f"size {size:.0f}", uri, size, finished(2))
    record(tmp_path / "stopped", uri, 3e6, Stopped(step=2, checkpoint=None, reason="SIGTERM"))
    record(tmp_path / "not evaluated", uri, 5e6, finished(2), is_evaluated=False)
    client = connect(uri)
    other = client.create_run(client.create_experiment("of another program"), run_name="other")
    client.log_metric(other.info.run_id, "eval/val/loss", 0.1)
    client.set_terminated(other.info.run_id)
    monkeypatch.setattr(scaling_runs, "PAGE", 2)  # a tracker with sweeps has thousands
    capsys.readouterr()
    assert main(["plan", "--scaling", uri, "--budget", str(160e6 * EPOCHS), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] == len(SIZES) and report["beyond"] == pytest.approx(10)
    assert report["slopes"]["loss"]["value"] == pytest.approx(SLOPE, abs=1e-4)
    assert report["proposal"]["loss"]["value"] == pytest.approx(loss_of(160e6), rel=1e-3)
    assert report["slopes"]["parameters"]["value"] == pytest.approx(1, abs=1e-3)


def test_a_tracker_without_such_runs_is_one_sentence(
    tmp_path: Path, empty_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(empty_database, tmp_path / "all.db")
    assert main(["plan", "--scaling", f"sqlite:///{tmp_path}/all.db"]) == 2
    assert "no finished pretraining run with an evaluation" in capsys.readouterr().err
