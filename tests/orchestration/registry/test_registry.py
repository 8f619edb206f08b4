"""A registered name gives back what was registered or nothing, on SQLite and on a real server; bytes do not go through it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestration.cli import main
from orchestration.registry import registry
from orchestration.registry.registry import find, load, register, unregister
from orchestration.tracking import sweep_summary
from orchestration.tracking.mlflow_client import connect
from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import load as load_module
from pipeline.checkpoint import retention
from pipeline.checkpoint.pull import pull
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.models import backbone
from pipeline.storage import objects
from tests.waiting import sentences

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
CLASSES = ["zero", "one", "two"]


def save(run: str, step: int) -> checkpoint.Commit:
    """A checkpoint of nfnet_tiny as a run of three classes leaves it."""
    torch.manual_seed(step)
    weights = dict(backbone.make("nfnet_tiny", len(CLASSES), {}).named_parameters())
    parts = {f"weights/{name}@0": value.detach().reshape(-1) for name, value in weights.items()}
    facts = {"samples": 640, "num_updates": step, "shapes": {n: list(w.shape) for n, w in weights.items()}}
    facts |= {
        "config": {"name": "tiny_run", "model": {"name": "nfnet_tiny", "options": {}}, "augment": {"image_px": 16}},
        "config_digest": "c" * 64,
    }
    facts |= {"dataset": {"name": "three", "url": "s3://data/three", "digest": "d" * 64}, "classes": CLASSES}
    saver = Saver(run, config=SavingConfig(), policy=Policy(last=10), world=ALONE, taken=retention.folder_names(run))
    saver.save(step=step, fragments=parts, facts=facts | {"evaluation": {"top1": 0.5, "loss": 1.25}}, final=True)
    return checkpoint.read_commit(checkpoint.checkpoint_url(run, step))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests of this process have set: uploaders that hurry leave their haste behind."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking URI on SQLite; a new database takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    connect(uri).search_registered_models()
    return uri


@pytest.fixture
def run(tmp_path: Path) -> str:
    save(f"{tmp_path}/run", 2)
    return f"{tmp_path}/run"


def test_a_name_gives_back_the_very_checkpoint(run: str, records: str, tmp_path: Path) -> None:
    made = register(run, "m1", alias="best", tracking_uri=records)
    for name in ("models:/m1@best", "models:/m1/1", "models://m1/1"):
        found = find(name, records)
        assert (found.version, found.digest, found.source) == (made.version, made.digest, made.source)
    pulled = pull(made.source, tmp_path / "here", digest=made.digest)
    assert pulled.commit.digest == made.digest == load_module.resolve(run, str(tmp_path)).digest


def test_one_line_loads_a_classifier_from_its_name(run: str, records: str, tmp_path: Path) -> None:
    register(run, "m2", alias="best", tracking_uri=records)
    loaded = load("models:/m2@best", tracking_uri=records, cache_dir=str(tmp_path / "cache"))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(image), backbone.load_backbone(run).model(image)) and loaded.classes == CLASSES
    assert not loaded.model.training


def test_a_version_tells_its_lineage_and_its_page_the_result(run: str, records: str) -> None:
    client = connect(records)
    experiment = client.create_experiment(f"lineage {time.time()}")
    digest = load_module.resolve(run, "unused").digest
    tags = {"checkpoint.digest": digest, "code.revision": "abc123"}
    mlflow_run = client.create_run(experiment, tags=tags).info.run_id
    made = register(run, "m3", tracking_uri=records)
    version = client.get_model_version("m3", made.version)
    wanted = {"normfree.digest": digest, "dataset": "three", "dataset.digest": "d" * 64, "config_digest": "c" * 64}
    wanted |= {
        "recipe": "tiny_run",
        "model": "nfnet_tiny",
        "run_id": mlflow_run,
        "code.revision": "abc123",
        "eval.top1": "0.5",
    }
    assert wanted.items() <= version.tags.items() and version.run_id == mlflow_run
    assert "640 images" in version.description and digest in version.description


def test_registering_again_makes_no_second_version_and_moves_the_alias(run: str, records: str) -> None:
    first = register(run, "m4", alias="best", tracking_uri=records)
    again = register(run, "m4", alias="best", tracking_uri=records)
    assert first.is_new and not again.is_new and again.version == first.version
    save(run, 4)
    second = register(run, "m4", alias="best", tracking_uri=records)
    assert second.is_new and find("models:/m4@best", records).digest == second.digest != first.digest


@pytest.mark.parametrize("name", ["bob's net", "100 % of_it", "Größe\\1"])
def test_a_name_with_signs_of_a_query_is_one_name(name: str, run: str, records: str) -> None:
    made = register(run, name, alias="best", tracking_uri=records)
    assert not register(run, name, tracking_uri=records).is_new
    assert unregister(run, records).unpinned == []  # its version lives
    assert find(f"models:/{name}@best", records).version == made.version
    (url,) = unregister(f"models:/{name}@best", records).unpinned
    assert retention.pins(url) == []


@pytest.mark.parametrize(
    ("name", "alias"),
    [*((name, None) for name in ("a@b", "a/b", "a:b", 'say "it"', " a", "a\nb")),
     ("m", "v1"), ("m", "Latest"), ("m", "the best")],
)  # fmt: skip
def test_a_name_that_nobody_could_pull_is_refused_before_anything_is_registered(
    name: str, alias: str | None, run: str, records: str
) -> None:
    with pytest.raises(UserError, match=r"write (it in letters|one that)"):
        register(run, name, alias=alias, tracking_uri=records)
    assert not connect(records).search_registered_models(f"name='{name}'") if '"' not in name else True
    assert retention.pins(load_module.resolve(run, "unused").url) == []


def test_an_alias_that_the_server_refuses_leaves_no_version_and_no_pin(
    run: str, records: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def refuses(*_: object) -> None:
        raise MlflowException("no alias today")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", refuses)
    with pytest.raises(UserError, match="no alias today"):
        register(run, "refused", alias="best", tracking_uri=records)
    assert not list(connect(records).search_model_versions("name='refused'"))
    assert retention.pins(load_module.resolve(run, "unused").url) == []


def test_a_registered_checkpoint_is_never_deleted_by_its_run(run: str, records: str, tmp_path: Path) -> None:
    made = register(run, "m5", alias="best", tracking_uri=records)
    for step in (4, 6, 8):
        save(run, step)
    retention.retain(run, Policy(last=1))
    assert pull(find("models:/m5@best", records).source, tmp_path / "here").commit.digest == made.digest
    assert len(checkpoint.committed(run)) == 2


def test_another_checkpoint_in_the_registered_ones_place_is_refused(run: str, records: str, tmp_path: Path) -> None:
    made = register(run, "m6", alias="best", tracking_uri=records)
    path = objects.local_path(made.source) / checkpoint.COMMIT
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_s": 0}))
    with pytest.raises(UserError, match="not the checkpoint that was registered"):
        load("models:/m6@best", tracking_uri=records, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_what_does_not_verify_is_not_registered_and_not_pinned(run: str, records: str) -> None:
    commit = load_module.resolve(run, "unused")
    place = Path(commit.url) / commit.files[0]["name"]
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="does not verify"):
        register(commit.url, "m7", tracking_uri=records)
    with pytest.raises(UserError, match="is not there"):
        find("models:/m7/1", records)
    assert not (Path(commit.url) / retention.KEEP).exists()


def test_a_sweep_of_other_weights_is_refused_and_its_own_becomes_the_scorecard(
    run: str, records: str, tmp_path: Path
) -> None:
    from transfer.sweep.ledger import Ledger, SweepInfo

    digest = load_module.resolve(run, "unused").digest
    for name, theirs in (("other", "e" * 64), ("own", digest)):
        facts = {
            "suite": "demo",
            "suite_digest": "",
            "checkpoint_url": run,
            "checkpoint_digest": theirs,
            "model": "nfnet_tiny",
        }
        facts |= {"started_s": 0.0, "command": "", "hardware": "", "num_seeds": 1, "not_run": []}
        Ledger(str(tmp_path / name)).claim(SweepInfo(**facts))
    with pytest.raises(UserError, match="about another checkpoint"):
        register(run, "m8", scorecard=str(tmp_path / "other"), tracking_uri=records)
    with pytest.raises(UserError, match="no finished trial"):
        register(run, "m8", scorecard=str(tmp_path / "own"), tracking_uri=records)
    with pytest.raises(UserError, match="is not there"):
        find("models:/m8/1", records)


def test_a_scorecard_stands_in_tags_and_on_the_page(run: str, records: str, tmp_path: Path) -> None:
    from transfer.sweep.entry import Trial, entry
    from transfer.sweep.ledger import Ledger, SweepInfo

    digest = load_module.resolve(run, "unused").digest
    sweep = Ledger(str(tmp_path / "sweep"))
    facts = {
        "suite": "demo",
        "suite_digest": "",
        "checkpoint_url": run,
        "checkpoint_digest": digest,
        "model": "nfnet_tiny",
    }
    sweep.claim(SweepInfo(**facts, started_s=0.0, command="", hardware="", num_seeds=2, not_run=[]))
    for init, values in (("pretrained", (0.74995, 0.76005)), ("scratch", (0.5, 0.51))):
        for seed, value in enumerate(values):
            what = {"kind": "final", "task": "digits", "method": "ridge", "init": init, "shots": 5, "seed": seed}
            digests = {
                "protocol_digest": "p",
                "data_digest": "d",
                "checkpoint_digest": digest if init == "pretrained" else "",
            }
            trial = Trial(**what, hyperparameters={}, **digests)
            sweep.write(entry(trial, task_title="Digits", checkpoint_url=run, value=value))
    made = register(run, "m10", scorecard=str(tmp_path / "sweep"), tracking_uri=records)
    version = connect(records).get_model_version("m10", made.version)
    (row,) = json.loads(version.tags["scorecard.rows"])
    assert (row["task"], row["shots"], row["pretrained"], row["gain"]) == ("digits", 5, 0.755, 0.25)
    page = version.description.replace(sweep_summary.GAP, "").replace("\u00a0", " ")
    assert (
        "| Digits | top-1, % | ridge | 5 | 75.5 [68.5, 81.3] | 50.5 [44.2, 56.8] | +25.0 ± 0.1 | 2 | <0.001 | wins |"
        in page
    )


def test_two_commands_from_a_name_to_a_classified_picture(
    records: str,
    make_checkpoint: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    register(make_checkpoint(tmp_path / "run"), "m11", alias="best", tracking_uri=records)
    Image.new("RGB", (20, 20), (200, 30, 30)).save("photo.png")
    assert main(["pull", "models:/m11@best", "--to", "mine", "--tracking-uri", records]) == 0
    assert main(["pull", "models:/m11@best", "--to", "out", "--format", "safetensors", "--tracking-uri", records]) == 0
    capsys.readouterr()
    assert main(["classify", "mine", "photo.png", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert len(answer) > 1 and (tmp_path / "out" / "README.md").exists() and not (tmp_path / "out.checkpoint").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("models:/m1@nobody", "is not there"),
        ("models:/never@best", "is not there"),
        ("models:/never/3", "is not there"),
        ("models:/", "names no version"),
        ("models:/m1", "names no version"),
    ],
)
def test_a_name_that_is_not_there_is_one_sentence_and_exit_2(
    name: str,
    said: str,
    records: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pull", name, "--tracking-uri", records]) == 2
    error = capsys.readouterr().err
    assert said in error and len(sentences(error)) == 1 and not list(tmp_path.iterdir())


def test_no_tracker_is_one_sentence_and_makes_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="set --tracking-uri"):
        find("models:/m1@best")
    with pytest.raises(UserError, match="no MLflow records at"):
        find("models:/m1@best", f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def server(records: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback, on the database that is there already."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", records]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_server_knows_where_the_bytes_lie_and_takes_none(server: str, tmp_path: Path) -> None:
    run = "memory://registry-run"
    commit = save(run, 2)
    made = register(run, "remote", alias="best", tracking_uri=server, cache_dir=str(tmp_path / "c"))
    assert made.source == commit.url and find("models:/remote@best", server).digest == commit.digest
    with pytest.raises(UserError, match="copy the run to object storage"):
        save(f"{tmp_path}/run", 2)
        register(f"{tmp_path}/run", "remote", tracking_uri=server)
    assert not (Path(checkpoint.committed(f"{tmp_path}/run")[0]) / retention.KEEP).exists()
    with pytest.raises(UserError, match="has '/' in it"):
        register(run, "bad/name:", tracking_uri=server, cache_dir=str(tmp_path / "c"))
    assert connect(server).get_model_version("remote", "1").source.startswith("memory://")


def test_a_server_that_does_not_answer_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no answer from the server"):
        find("models:/m9@best", "http://ada:secret@127.0.0.1:9")
    assert registry.is_name("models:/m9/1") and not registry.is_name("s3://models/m9")
