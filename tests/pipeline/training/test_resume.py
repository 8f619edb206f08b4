"""Whatever a run folder records of the run's identity is compared when it is used again."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import provenance
from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import DataConfig
from pipeline.distributed import ALONE
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.records import Changed, Finished, Record, Started, Step
from pipeline.storage import objects
from pipeline.training import check_run, identity, resume
from pipeline.training.run import Run, flat, load_yaml, override
from pipeline.training.train import train
from tests.pipeline.data.format.forged import forge
from tests.pipeline.training.test_train import make_run


def small_run(url: str, **changes: Any) -> Run:
    return make_run(url, **{"duration": Duration(4, "steps"), "save_every": None, "eval_every": None, **changes})


@pytest.fixture(scope="module")
def done(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of four steps, and its data."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(digits, folder / "data")
    list(train(small_run(str(folder / "data")), str(folder / "run")))
    return folder / "run", folder / "data"


@pytest.fixture
def copy(done: tuple[Path, Path], tmp_path: Path) -> tuple[str, Path]:
    """A run folder to go on with, and the data at another place."""
    shutil.copytree(done[0], tmp_path / "run")
    shutil.copytree(done[1], tmp_path / "data")
    return str(tmp_path / "run"), tmp_path / "data"


def rewrite(data: Path, **changes: Any) -> Manifest:
    """The dataset with other classes or shards, under a digest that is right."""
    found = dataclasses.replace(Manifest.open(str(data)), **changes)
    found = dataclasses.replace(found, digest=manifests.dataset_digest(found.classes, found.splits))
    objects.write_bytes(data / manifests.NAME, found.to_json())
    return found


def refused(run: Run, out: str) -> str:
    with pytest.raises(UserError) as error:
        list(train(run, out))
    return str(error.value)


@pytest.mark.parametrize("has_record", [True, False])
def test_permuted_classes_are_refused_with_both_digests_and_the_first_difference(
    has_record: bool, copy: tuple[str, Path]
) -> None:
    out, data = copy
    before = Manifest.open(str(data))
    if not has_record:  # a run of an earlier version: its checkpoints know
        Path(out, identity.NAME).unlink()
    now = rewrite(data, classes=(before.classes[1], before.classes[0], *before.classes[2:]))
    text = refused(small_run(str(data)), out)
    assert before.digest[:12] in text and now.digest[:12] in text
    assert f"class 0 was '{before.classes[0]}' and is '{before.classes[1]}'" in text


def test_other_shards_are_refused_though_names_and_numbers_are_the_same(copy: tuple[str, Path]) -> None:
    out, data = copy
    forge(data, sha256="0" * 64)
    assert "the shards hold other bytes" in refused(small_run(str(data)), out)


def test_the_same_data_at_another_place_are_taken_and_that_is_said(copy: tuple[str, Path]) -> None:
    out, data = copy
    records = list(train(small_run(str(data)), out))
    (changed,) = [r for r in records if isinstance(r, Changed)]
    assert changed.what == "data" and str(data) in changed.text and isinstance(records[-1], Finished)
    assert load_yaml(Path(out, "run.yaml").read_text(), "run.yaml").data.url == str(data)


def test_a_finished_run_is_lengthened_and_says_what_that_does_to_the_schedule(copy: tuple[str, Path]) -> None:
    out, data = copy
    longer = small_run(str(data), duration=Duration(8, "steps"))
    records: list[Record] = list(train(longer, out))
    length = next(r for r in records if isinstance(r, Changed) and r.what == "length")
    assert "is 8 steps long now, and was 4" in length.text and "its cosine schedule had ended" in length.text
    rate = next(r for r in records if isinstance(r, Step)).learning_rate
    last = longer.optim.rate(3, total_steps=4, warmup_steps=3)
    assert f"jumps from {last:.4g} to {rate:.4g}" in length.text
    assert next(r for r in records if isinstance(r, Started)).step == 4 and records[-1].step == 8
    pages = json.loads(Path(out, "ledger.json").read_text())["pages"]
    assert sum(page["used"] * len(range(page["epochs"][0], page["epochs"][1] + 1)) for page in pages) == 8 * 16
    text = refused(small_run(str(data), duration=Duration(6, "steps")), out)
    assert "has done 8 steps, and 6 steps are 6" in text
    assert load_yaml(Path(out, "run.yaml").read_text(), "run.yaml").duration == Duration(8, "steps")


def test_other_code_and_versions_are_said_and_recorded(copy: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out, data = copy
    monkeypatch.setattr(provenance, "code_revision", lambda: "0123456789+")
    monkeypatch.setattr(provenance, "libraries", lambda: "torch 9.9, numpy 1.0")
    said = {r.what: r.text for r in train(small_run(str(data)), out) if isinstance(r, Changed)}
    assert "the code is 0123456789+" in said["code"]
    now, before = said["libraries"].split("; it was last started with ")
    assert now == "the run goes on with torch 9.9, numpy 1.0"
    assert "torch 9.9" not in before and "numpy 1.0" not in before and "torch" in before
    assert json.loads(Path(out, identity.NAME).read_text())["code"] == "0123456789+"


def test_ranks_compare_the_digest_of_their_data_and_all_of_a_long_field(copy: tuple[str, Path]) -> None:
    _, data = copy
    runs = [small_run(str(data), name="n" * 250 + end) for end in "ab"]
    one, other = (identity.facts(run, 0) for run in runs)
    assert {name for name in one if one[name] != other[name]} == {"field name"} and len(one["field name"]) < 250
    assert one["data"] == Manifest.open(str(data)).digest[:16]


def test_a_run_without_a_checkpoint_does_not_start_over_from_other_weights(tmp_path: Path) -> None:
    kept = identity.Identity(sources=[], names=[], classes=[])
    identity.write(str(tmp_path), kept)
    identity.claim_start(str(tmp_path), "weights of a")
    identity.claim_start(str(tmp_path), "weights of a")
    with pytest.raises(UserError, match="started from weights of a, and now it would from weights of b"):
        identity.claim_start(str(tmp_path), "weights of b")


def test_a_config_field_that_decides_numbers_is_refused(copy: tuple[str, Path]) -> None:
    out, data = copy
    run = small_run(str(data), data=DataConfig(url=str(data), mix_blocks=4, block_mb=0.02))
    assert "data.block_mb = 0.01, this one has 0.02" in refused(run, out)


def test_other_data_are_refused_before_the_first_checkpoint_too(copy: tuple[str, Path]) -> None:
    out, data = copy
    shutil.rmtree(Path(out, "checkpoints"))
    before = Manifest.open(str(data))
    rewrite(data, classes=(before.classes[1], before.classes[0], *before.classes[2:]))
    assert "class 0 was" in refused(small_run(str(data)), out)


def test_every_changeable_field_is_one_and_may_be_changed(copy: tuple[str, Path]) -> None:
    out, _ = copy
    names = flat(make_run("data"))
    for each in resume.CHANGEABLE:
        assert each in names or any(name.startswith(f"{each}.") for name in names), each
    changed = {
        "log_every_steps": 3,
        "keep_checkpoints": 7,
        "data.max_lost_share": 0.25,
        "saving.max_wait_s": 50.0,
        "watchdog.limit_s": 50.0,
    }
    run = override(load_yaml(Path(out, "run.yaml").read_text(), "run.yaml"), changed)
    assert isinstance(list(train(run, out))[-1], Finished)


def test_another_precision_is_said_once(copy: tuple[str, Path]) -> None:
    out, _ = copy
    run = override(
        load_yaml(Path(out, "run.yaml").read_text(), "run.yaml"), {"engine.precision": "bf16", "engine.tf32": True}
    )
    for said in ({"engine.precision": "is bf16 now, and was fp32:", "engine.tf32": "is True now, and was False:"}, {}):
        changed = {r.what: r.text for r in train(run, out) if isinstance(r, Changed) and "engine." in r.what}
        assert changed.keys() == said.keys() and all(said[what] in text for what, text in changed.items())


def test_another_optimiser_is_refused_naming_both(copy: tuple[str, Path]) -> None:
    out, data = copy
    run = small_run(str(data))
    refusal = refused(dataclasses.replace(run, optim=dataclasses.replace(run.optim, name="adamw", clip="norm")), out)
    assert "optim.name = 'sgd', this one has 'adamw'" in refusal


def test_another_network_than_the_checkpoints_is_refused_naming_both(copy: tuple[str, Path]) -> None:
    commit, _ = resume.newest(copy[0], copy[0], ALONE)
    assert commit is not None
    resume.refuse_other_network(commit, commit.shapes, commit.buffers)
    name = next(iter(commit.shapes))
    others = {n: s for n, s in commit.shapes.items() if n != name}
    with pytest.raises(UserError, match=rf"has {name} as F32 \[.*the network here as nothing"):
        resume.refuse_other_network(commit, others, {})
    with pytest.raises(UserError, match=r"has count as nothing, and the network here as I64 \[\]"):
        resume.refuse_other_network(commit, {**commit.shapes, "count": ()}, {"count": "I64"})
    with pytest.raises(UserError, match=rf"has {name} as F32 .*the network here as BF16"):
        resume.refuse_other_network(commit, commit.shapes, {name: "BF16"})


def test_a_disk_without_room_for_a_checkpoint_is_refused(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(digits)
    assert check_run.check_room(run, str(tmp_path / "run")) == check_run.check_room(run, "s3://bucket/run") == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "a checkpoint of this run takes" in refused(run, str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
    assert check_run.check_room(dataclasses.replace(run, save_every=None, save_final=False), str(tmp_path)) == ""
