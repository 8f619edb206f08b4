"""What a person sees: MLflow's own pages over our records, in headless Chromium."""

import time
from pathlib import Path

import pytest

from orchestration.spool.spool import Spool
from orchestration.tracking.mlflow_client import connect, first_page
from orchestration.tracking.sweep_tracking import SweepTracker
from orchestration.tracking.uploader import Uploader
from tests.mlflow_server import mlflow_server
from tests.orchestration.pages import find_browser, look
from tests.orchestration.tracking.test_tracking import finished, started, step, trial
from transfer.report.html_page import policy
from transfer.report.html_template import fill

pytestmark = pytest.mark.slow


def test_list_run_picture_and_sweep_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_browser() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    monkeypatch.setenv("NORMFREE_PICTURES", "1")
    with mlflow_server(tmp_path / "mlflow.db") as server:
        with Spool(tmp_path / "records.jsonl") as spool:
            for record in (started(), *(step(n) for n in range(1, 31)), finished(30)):
                spool.append(record)
        work = Uploader(tmp_path, server.uri, experiment="pretrain", run_name="glyphs", poll_s=0.05, drain_s=300.0)
        assert work.run() == 0
        sweep = SweepTracker(server.uri, "transfer", "a sweep", tmp_path / "sweep")
        trial(sweep, "a")
        sweep.parent_summary(
            {}, {"digits/ridge/5/gain": 0.2}, [], {"mlflow.note.content": "| task |\n|---|\n| Digits |"}
        )
        sweep.close("ok")
        client = connect(server.uri)
        run = client.get_run(work.run_id or "")
        page = f"{server.uri}/#/experiments/{run.info.experiment_id}/runs"
        assert "glyphs" in look(page, tmp_path / "list.png")
        shown = look(f"{page}/{run.info.run_id}", tmp_path / "run.png", "1400x1500")
        assert "train/loss" in shown and "all steps are done" in shown and "Finished" in shown
        assert "<img" in look(f"{page}/{run.info.run_id}/artifacts/pictures/training.png", tmp_path / "picture.png")
        parent = client.get_experiment_by_name("transfer")
        (found,) = (r for r in client.search_runs([parent.experiment_id]) if r.info.run_name == "a sweep")
        shown = look(f"{server.uri}/#/experiments/{parent.experiment_id}/runs/{found.info.run_id}")
        assert "Digits" in shown and "digits/ridge/5/gain" in shown and "trial a" in shown


def test_a_sweep_is_shown_as_training_and_its_scorecard_opens_in_the_page(tmp_path: Path) -> None:
    """The experiment was made by somebody in MLflow's pages, who said nothing of its kind."""
    if find_browser() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with mlflow_server(tmp_path / "mlflow.db") as server:
        client = connect(server.uri)
        experiment = client.create_experiment("transfer")
        sweep = SweepTracker(server.uri, "transfer", "a sweep", tmp_path / "sweep")
        trial(sweep, "a")
        report = tmp_path / "sweep" / "report" / "scorecard.html"
        report.parent.mkdir(parents=True)
        report.write_text(
            str(
                fill(
                    "page.html.j2",
                    title="T",
                    policy=policy(),
                    sections=[fill("failures.html.j2", failed=[], not_run=[])],
                )
            )
        )
        sweep.parent_summary({}, {}, [report])
        assert sweep.close("ok")
        assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "custom_model_development"
        (found,) = (r for r in client.search_runs([experiment]) if r.info.run_name == "a sweep")
        assert first_page(client) == f"#/experiments/{experiment}/runs?workflowType=machine_learning"
        shown = look(f"{server.uri}/{first_page(client)}", tmp_path / "list.png")
        assert "a sweep" in shown and "Model registry" in shown
        assert (
            "Judges" not in shown and "Evaluation runs" not in shown
        )  # what the pages for language models have at the side
        address = f"{server.uri}/#/experiments/{experiment}/runs/{found.info.run_id}/artifacts/scorecard.html"
        assert "<iframe" in look(address, tmp_path / "scorecard.png", "1400x1000")


def test_a_sweep_of_500_trials_is_there_whole_and_told_apart(tmp_path: Path) -> None:
    names = [f"search {n:06x} digits linear 5 pretrained" for n in range(500)]
    begin_s = time.monotonic()
    sweep = SweepTracker(None, "transfer", "a sweep", tmp_path)
    for n, name in enumerate(names):
        rows = [{"step": float(s), "time_s": 1.7e9 + s, "loss": 1.0 / (s + 1)} for s in range(5)]
        params = {"learning_rate": 0.01 * (n + 1), "shots": 5}
        sweep.child(f"{n:064x}", name, params, rows, {"score": n / 500}, {"task": "digits"}, "ok")
    sweep.parent_summary({}, {"num_trials": 500.0}, [], {})
    assert sweep.close("ok") and sweep.num_failures == 0
    took_s = time.monotonic() - begin_s
    client = connect(sweep.uri)
    parent = client.get_experiment_by_name("transfer")
    children = client.search_runs([parent.experiment_id], "tags.`mlflow.parentRunId` != ''", max_results=1000)
    assert sorted(run.info.run_name for run in children) == sorted(names)
    # An axis of parallel coordinates takes what is a number for each of the runs.
    assert sorted(float(run.data.params["learning_rate"]) for run in children) == pytest.approx(
        [0.01 * (n + 1) for n in range(500)]
    )
    assert all(set(run.data.params) == {"learning_rate", "shots"} for run in children)
    assert all("final/score" in run.data.metrics and run.info.status == "FINISHED" for run in children)
    print(f"500 children in {took_s:.0f} s")
