"""From a sweep's trial to the run that saved its checkpoint and back, and both to the registered model."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration.registry.registry import register, unregister
from orchestration.spool.spool import Spool
from orchestration.tracking import heartbeat, lineage, mlflow_client
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.sweep_records import SweepRecords
from orchestration.tracking.tracking_uri import resolve_uri
from orchestration.tracking.uploader import Uploader
from pipeline.checkpoint.commit import Commit
from pipeline.records import Saved
from tests.orchestration.registry.test_registry import save
from tests.orchestration.serve.test_object_store_records import made_sweep
from tests.orchestration.tracking.test_tracking import finished, started

ROOT = Path(mlflow_client.__file__).parents[2]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/all.db"


def pretrained(run_dir: Path, uri: str | None) -> tuple[Commit, str]:
    """A checkpoint and, on a tracker, the run that saved it and others before and after."""
    commit = save(str(run_dir), 2)
    digests = ["1" * 64, commit.digest, "2" * 64]
    with Spool(run_dir / "records.jsonl") as spool:
        spool.append(started())
        for number, digest in enumerate(digests, start=1):
            spool.append(Saved(step=number, url=commit.url, digest=digest, size_bytes=1, seconds_s=1.0))
        spool.append(finished(3))
    work = Uploader(run_dir, uri, experiment="pretrain", run_name="r", poll_s=0.02, drain_s=60.0)
    assert work.run() == 0 and work.run_id
    return commit, work.run_id


def swept(folder: Path, commit: Commit, uri: str, started_s: float = 1.0) -> tuple[Any, list[Any]]:
    """A sweep of it on a tracker: its parent run, the runs of its trials."""
    made_sweep(str(folder), commit.digest, checkpoint_url=commit.url, started_s=started_s)
    assert SweepRecords(str(folder), uri).send_all(here=False)
    return family(uri, str(folder))


def family(uri: str, sweep: str) -> tuple[Any, list[Any]]:
    client = connect(uri)
    runs = client.search_runs(heartbeat.all_experiments(client))
    (parent,) = (run for run in runs if run.data.tags.get("sweep_dir") == sweep)
    return parent, [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def walks(uri: str, parent: Any, children: list[Any], run_id: str, digest: str) -> None:
    """Both ways, by what stands in tags alone."""
    client = connect(uri)
    of_checkpoint = [run for run in children if run.data.params["init"] == "pretrained"]
    assert of_checkpoint and {run.data.tags["pretraining.run_id"] for run in (parent, *of_checkpoint)} == {run_id}
    assert not [r for r in children if r not in of_checkpoint and "pretraining.run_id" in r.data.tags]
    back = lineage.sweeps_of(client.get_run(run_id), digest)
    (text,) = [text for text in back.values() if parent.info.run_id in text]
    assert text.startswith(parent.data.tags["sweep_dir"])


def test_sweep_run_and_model_are_linked_both_ways_in_any_order(tmp_path: Path, uri: str) -> None:
    commit, run_id = pretrained(tmp_path / "run", uri)
    walks(uri, *swept(tmp_path / "first", commit, uri), run_id, commit.digest)
    made = register(commit.url, "m", tracking_uri=uri)
    second = swept(tmp_path / "second", commit, uri, 2.0)
    walks(uri, *second, run_id, commit.digest)
    client = connect(uri)
    version = client.get_model_version("m", made.version)
    links = {tag: text for tag, text in version.tags.items() if tag.startswith("sweep.")}
    assert version.run_id == run_id and links == lineage.sweeps_of(client.get_run(run_id), commit.digest)
    assert len(links) == 2 and lineage.sweeps_of(client.get_run(run_id), "1" * 64) == {}
    assert "models:/m/1" in client.get_run(run_id).data.tags["registered.m.1"]
    unregister("models:/m/1", uri)
    assert "registered.m.1" not in client.get_run(run_id).data.tags


def test_a_run_on_another_tracker_is_found_by_its_folders_own_account(tmp_path: Path, uri: str) -> None:
    commit, run_id = pretrained(tmp_path / "run", None)
    parent, children = swept(tmp_path / "sweep", commit, uri)
    for run in (parent, *(c for c in children if c.data.params["init"] == "pretrained")):
        tags = run.data.tags
        assert tags["pretraining.run_id"] == run_id and tags["pretraining.tracking_uri"] == str(tmp_path / "run")
    theirs = connect(resolve_uri(None, parent.data.tags["pretraining.tracking_uri"])).get_run(run_id)
    assert commit.digest[:16] in theirs.data.tags["checkpoint.digests"]
    shutil.rmtree(tmp_path / "run")
    again = lineage.origin(connect(uri), commit.digest, commit.url)
    assert again == lineage.Origin() and again.tags == {}


SUITE = (
    "name: small\ntasks: [{card: digits, holdout_per_class: 2}]\nnum_seeds: 1\nmethods: {knn: {shots: [1], ks: [1]}}\n"
)


@pytest.mark.slow
def test_a_real_pretraining_and_a_real_sweep_on_one_store_are_linked(digits: str, tmp_path: Path, uri: str) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    run, sweep = tmp_path / "run", tmp_path / "sweep"
    words = (
        f"pretrain nfnet_tiny_glyphs --data.url {digits} --out {run} --global_batch 16 --augment.image_px 16".split()
    )
    words += ["--optim.warmup", "1 steps", "--duration", "3 steps"]
    second = f"transfer {run} --suite {tmp_path}/suite.yaml --data-root {Path(digits).parent} --out {sweep}".split()
    for command in (words, second):
        done = subprocess.run(
            [sys.executable, "-m", "orchestration.cli", *command, "--tracking-uri", uri],
            cwd=ROOT,
            env=os.environ | {"RAY_TMPDIR": "/tmp"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    parent, children = family(uri, str(sweep))
    (pretraining,) = connect(uri).search_runs([connect(uri).get_experiment_by_name("pretrain").experiment_id])
    digest = parent.data.tags["checkpoint_digest"]
    assert pretraining.data.tags["checkpoint.digest"] == digest
    walks(uri, parent, children, pretraining.info.run_id, digest)
