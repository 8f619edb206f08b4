"""Runs, sweeps and models whose folder is in a real S3 store: any machine shows them, imports them, registers them, once."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from orchestration.registry.registry import find, load, register, unregister
from orchestration.serve.import_records import records_of
from orchestration.spool.mirror import Mirror, pull
from orchestration.spool.spool import Spool, records_folder
from orchestration.tracking import heartbeat, mlflow_client
from orchestration.tracking.mlflow_client import connect
from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import retention
from pipeline.errors import UserError
from pipeline.storage import objects
from tests.mlflow_server import MlflowServer, mlflow_server
from tests.orchestration.registry.test_registry import save
from tests.orchestration.tracking.test_tracking import finished, started, step
from tests.s3_server import bucket
from tests.waiting import sentences
from transfer.sweep.entry import Trial, entry
from transfer.sweep.ledger import Ledger, SweepInfo

ROOT = Path(mlflow_client.__file__).parents[2]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests of this process have set: uploaders that hurry leave their haste behind."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with bucket(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once."""
    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine("a"): from here on this process has that machine's cache folder and no other."""

    def move(name: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / name))

    return move


def trained(url: str, machine: Any, first: int, last: int, *, is_over: bool = True) -> None:
    """The records that a training of the run `url` on that machine leaves in the store."""
    machine("trainer")
    with Spool(records_folder(url) / "records.jsonl") as spool:
        for record in (started(first - 1), *(step(n) for n in range(first, last + 1))):
            spool.append(record)
        if is_over:
            spool.append(finished(last))
    Mirror(records_folder(url), url, own=("records.jsonl",)).push()
    objects.write_bytes(objects.join(url, "run.yaml"), b"name: in the store\n")


def all_runs(uri: str) -> list[Any]:
    client = connect(uri)
    return list(client.search_runs(heartbeat.all_experiments(client)))


def once(uri: str, run: Any, last: int) -> bool:
    points = connect(uri).get_metric_history(run.info.run_id, "train/loss")
    return sorted(p.step for p in points) == list(range(1, last + 1))


def test_a_run_is_imported_by_two_machines_as_one_and_goes_on_as_one(
    store: str, machine: Any, tmp_path: Path, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, uri = f"{store}/runs/a", f"sqlite:///{shutil.copy(empty, tmp_path / 'all.db')}"
    words = ["track", "import", url, "--tracking-uri", uri]
    trained(url, machine, 1, 20, is_over=False)
    for name in ("b", "c", "b"):
        machine(name)
        assert main(words) == 0
    (run,) = all_runs(uri)
    assert once(uri, run, 20) and run.info.status == "KILLED" and "goes on elsewhere" in run.data.tags["status.cause"]
    trained(url, machine, 21, 30)
    for name in ("c", "b"):
        machine(name)
        assert main(words) == 0
    (run,) = all_runs(uri)
    assert once(uri, run, 30) and run.info.status == "FINISHED" and run.data.metrics["final/top1"] == 0.75
    names = [file.path for file in connect(uri).list_artifacts(run.info.run_id)]
    assert names == ["run.yaml"]
    capsys.readouterr()
    assert main(["track", "status", "--tracking-uri", uri]) == 0
    assert f"{run.info.run_id}  finished" in capsys.readouterr().out


def test_the_records_of_a_run_are_brought_here_and_what_is_added_follows(
    store: str, machine: Any, empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    url = f"{store}/runs/shown/"
    trained(url, machine, 1, 5, is_over=False)
    # The trainer's own SQLite stays on its machine; its account of it travels, and means nothing elsewhere.
    account = {"sqlite:///./mlflow.db": {"run_id": "f" * 32, "token": "t", "acknowledged": 6, "beside": {}}}
    objects.write_bytes(objects.join(url, "spool", "tracking.json"), json.dumps(account).encode())
    machine("viewer")
    records_folder(url)
    shutil.copy(empty, records_folder(url) / "mlflow.db")
    uri = records_of(url)
    (before,) = all_runs(uri)
    assert once(uri, before, 5)
    trained(url, machine, 6, 9)
    machine("viewer")
    assert pull(url, records_folder(url))
    (state,) = json.loads((records_folder(url) / "tracking.json").read_text()).values()
    assert state["run_id"] == before.info.run_id and records_of(url) == uri
    (after,) = all_runs(uri)
    assert after.info.run_id == before.info.run_id and once(uri, after, 9) and after.info.status == "FINISHED"
    assert main(["track", "status", url]) == 0 and after.info.run_id in capsys.readouterr().out


def test_folders_that_differ_in_a_slash_have_records_of_their_own() -> None:
    folders = {records_folder(url) for url in ("s3://b/runs/a", "s3://b/runs-a", "s3://b-runs/a", "s3://b/runs/a/")}
    assert len(folders) == 3


def made_sweep(
    url: str, digest: str, *, is_over: bool = True, checkpoint_url: str = "s3://b/run", started_s: float = 1.5
) -> None:
    """Two seeds of one cell, as a sweep leaves them in its ledger."""
    facts: dict[str, Any] = {"suite": "demo", "suite_digest": "5", "checkpoint_url": checkpoint_url}
    facts |= {
        "checkpoint_digest": digest,
        "model": "nfnet_tiny",
        "started_s": started_s,
        "command": "normfree transfer",
    }
    sweep = Ledger(url)
    sweep.claim(SweepInfo(**facts, hardware="", num_seeds=2, not_run=[], plan={"data_root": "s3://b/data"}))
    for init, value in (("pretrained", 0.75), ("scratch", 0.5)):
        for seed in (0, 1):
            what: dict[str, Any] = {"kind": "final", "task": "digits", "method": "ridge", "init": init, "shots": 5}
            theirs = digest if init == "pretrained" else ""
            digests = {"protocol_digest": "p", "data_digest": "d", "checkpoint_digest": theirs}
            trial = Trial(**what, seed=seed, hyperparameters={"l2": 1.0}, **digests)
            history = [{"step": n, "time_s": 1.7e9 + n, "loss": 1.0 / n} for n in (1, 2)]
            made = entry(trial, task_title="Digits", checkpoint_url=checkpoint_url, value=value, history=history)
            sweep.write(made)
    if is_over:
        objects.write_bytes(objects.join(url, "report", "scorecard.html"), b"<h1>Scorecard</h1>")


def test_a_sweep_is_imported_by_two_machines_as_one(store: str, machine: Any, tmp_path: Path, empty: Path) -> None:
    url, uri = f"{store}/sweeps/a", f"sqlite:///{shutil.copy(empty, tmp_path / 'all.db')}"
    made_sweep(url, "a" * 64, is_over=False)
    words = ["track", "import", url, "--tracking-uri", uri]
    machine("a")
    assert main(words) == 0
    (parent,) = (r for r in all_runs(uri) if "mlflow.parentRunId" not in r.data.tags)
    assert parent.info.status == "KILLED" and "not come to its end" in parent.data.tags["status.cause"]
    made_sweep(url, "a" * 64)
    for name in ("b", "a", "b"):
        machine(name)
        assert main(words) == 0
    runs = all_runs(uri)
    (parent,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and len(runs) == 5 and parent.info.run_name == "demo of run"
    assert parent.info.status == "FINISHED" and "status.cause" not in parent.data.tags
    client = connect(uri)
    for child in children:
        assert len(client.get_metric_history(child.info.run_id, "loss")) == 2 and child.info.status == "FINISHED"
        (used,) = child.inputs.dataset_inputs
        assert json.loads(used.dataset.source)["uri"] == "s3://b/data/digits"
    assert parent.data.metrics["digits/ridge/5/gain"] == 0.25
    assert len(client.get_metric_history(parent.info.run_id, "digits/ridge/5/gain")) == 1
    assert "+25.0" in parent.data.tags["mlflow.note.content"] and parent.data.tags["sweep_dir"] == url
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["scorecard.html"]


@pytest.mark.slow  # a server of its own; what it shows is made by `records_of`
def test_ui_shows_a_sweep_that_lies_in_the_store(store: str, tmp_path: Path, empty: Path) -> None:
    url = f"{store}/sweeps/shown"
    made_sweep(url, "a" * 64)
    said = tmp_path / "said"
    with said.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "orchestration.cli", "ui", url, "--port", "0"],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdout=file,
            stderr=file,
        )
    try:
        until = time.monotonic() + 300
        while not (found := re.search(r"at (http://\S+) ", said.read_text())):
            assert server.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        asked = urllib.request.Request(
            f"{found[1]}/api/2.0/mlflow/runs/search",
            json.dumps({"experiment_ids": ["0", "1"]}).encode(),
            {"Content-Type": "application/json"},
        )
        runs = json.load(urllib.request.urlopen(asked, timeout=60))["runs"]
        assert sum(run["info"]["run_name"].startswith("final ") for run in runs) == 4 and len(runs) == 5
    finally:
        server.terminate()  # where tests run in the background SIGINT is ignored
        server.wait(120)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("ui s3://bucket/nothing", "no records of a run or sweep at s3://bucket/nothing"),
        ("track import s3://bucket/nothing", "no records of a run or sweep at s3://bucket/nothing"),
        ("track status s3://nobucket/run", "the bucket of s3://nobucket/run"),
        ("ui s3://nobucket/run", "the bucket of s3://nobucket/run"),
    ],
)
@pytest.mark.usefixtures("store")
def test_what_is_not_there_is_one_sentence(
    words: str, match: str, machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("anywhere")
    assert main(words.split()) == 2
    last, *before = reversed(sentences(capsys.readouterr().err))
    place = words.split()[-1]
    assert match in last and before == ([f"reading the records of {place} ..."] if words.startswith("ui") else [])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty: Path) -> Iterator[MlflowServer]:
    """A server that knows nothing of the store, as most do."""
    tables = Path(shutil.copy(empty, tmp_path_factory.mktemp("server") / "mlflow.db"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        running = mlflow_server(tables)
        address = running.__enter__()
    try:
        yield address
    finally:
        running.__exit__(None, None, None)


def test_a_checkpoint_in_the_store_is_registered_pulled_and_unregistered_over_http(
    store: str, server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{store}/runs/registered"
    commit = save(run, 2)
    tracker = ["--tracking-uri", server.uri]
    assert main(["register", run, "digits", "--alias", "best", *tracker]) == 0
    found = find("models:/digits@best", server.uri)
    assert (found.source, found.digest) == (commit.url, commit.digest) and commit.url.startswith("s3://")
    assert main(["pull", "models:/digits@best", "--to", str(tmp_path / "here"), *tracker]) == 0
    assert checkpoint.read_commit(str(tmp_path / "here")).digest == commit.digest
    assert load("models:/digits@best", tracking_uri=server.uri, cache_dir=str(tmp_path / "c")).digest == commit.digest
    retention.pin(commit.url, "a transfer sweep refers to it: s3://b/sweep")
    capsys.readouterr()
    assert main(["unregister", "models:/digits@best", *tracker]) == 0
    said = capsys.readouterr().out
    assert f"unpinned: {commit.url}" in said and "still kept" in said and "s3://b/sweep" in said
    assert retention.pins(commit.url) == ["a transfer sweep refers to it: s3://b/sweep"]
    with pytest.raises(UserError, match="is not there"):
        find("models:/digits@best", server.uri)


def test_a_version_deleted_in_mlflows_pages_gives_its_checkpoint_free_and_others_do_not(
    store: str, server: MlflowServer, tmp_path: Path
) -> None:
    run = f"{store}/runs/deleted"
    old, new = save(run, 2), save(run, 4)
    for commit in (old, new):
        register(commit.url, "kept", tracking_uri=server.uri, cache_dir=str(tmp_path / "c"))
    connect(server.uri).delete_model_version("kept", "1")
    done = unregister(run, server.uri)
    assert done.unpinned == [old.url] and done.kept[old.url] == [] and len(done.kept[new.url]) == 1
    policy = retention.Policy(last=1)
    save(run, 6)
    assert retention.retain(run, policy) == [old.url] and unregister(run, server.uri).unpinned == []
    again = register(new.url, "kept", tracking_uri=server.uri, cache_dir=str(tmp_path / "c"))
    assert not again.is_new and asdict(again)["version"] == "2"
