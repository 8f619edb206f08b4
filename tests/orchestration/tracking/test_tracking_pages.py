"""What a person sees: MLflow's own pages over our records, in headless Chromium."""

from pathlib import Path

import pytest

from orchestration.spool.spool import Spool
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.sweep_tracking import SweepTracker
from orchestration.tracking.uploader import Uploader
from tests.mlflow_server import mlflow_server
from tests.orchestration.pages import find_browser, look
from tests.orchestration.tracking.test_tracking import finished, started, step, trial

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
