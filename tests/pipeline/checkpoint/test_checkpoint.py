"""A checkpoint exists when its commit file does, and is used when every byte of it verifies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import load
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.records import Saved

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SHAPES = {"a.weight": [4, 3], "b.bias": [5]}
FACTS: dict[str, Any] = {
    "samples": 1,
    "num_updates": 1,
    "shapes": SHAPES,
    "config": {"model": {"name": "nfnet_tiny", "options": {}}},
    "config_digest": "",
    "dataset": {},
    "classes": ["x"],
    "evaluation": {},
}


def fragments(value: float) -> dict[str, torch.Tensor]:
    return {
        "weights/a.weight@0": torch.full((7,), value),
        "weights/a.weight@7": torch.full((5,), value + 1),
        "weights/b.bias@0": torch.full((5,), value + 2),
    }


def save(run_dir: Path, step: int, part: dict[str, torch.Tensor] | None = None) -> checkpoint.Commit:
    saver = Saver(str(run_dir), config=SavingConfig(), policy=Policy(last=10), world=ALONE, taken=set())
    (record,) = saver.save(step=step, fragments=part or fragments(float(step)), facts=FACTS, final=True)
    assert isinstance(record, Saved), record
    return checkpoint.read_commit(record.url)


def newest(run_dir: Path) -> tuple[checkpoint.Commit | None, list[Any]]:
    return load.newest(str(run_dir), str(run_dir / "cache"))


def test_fragments_come_back_as_whole_tensors(tmp_path: Path) -> None:
    weights, commit = load.load_weights(save(tmp_path, 3).url)
    assert weights["a.weight"].flatten().tolist() == [3.0] * 7 + [4.0] * 5
    assert weights["b.bias"].tolist() == [5.0] * 5 and commit.step == 3


def test_without_its_commit_file_a_checkpoint_is_invisible(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (Path(save(tmp_path, 2).url) / checkpoint.COMMIT).unlink()
    found, passed = newest(tmp_path)
    assert found is not None and found.step == 1 and not passed


DAMAGE = {
    "one byte changed": lambda f: f.write_bytes(f.read_bytes()[:-1] + bytes([f.read_bytes()[-1] ^ 1])),
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-8]),
    "empty": lambda f: f.write_bytes(b""),
    "missing": lambda f: f.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_kept_and_reported(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    bad = Path(save(tmp_path, 2).url)
    DAMAGE[damage](next(bad.glob("*.safetensors")))
    found, passed = newest(tmp_path)
    assert found is not None and found.step == 1
    assert [p.url for p in passed] == [str(bad)] and "does not verify" in passed[0].reason
    assert (bad / checkpoint.COMMIT).exists()
    with pytest.raises(UserError, match="does not verify"):
        load.load_weights(str(bad))


def test_a_damaged_commit_file_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (Path(save(tmp_path, 2).url) / checkpoint.COMMIT).write_text('{"format": 1, "step"')
    found, passed = newest(tmp_path)
    assert found is not None and found.step == 1 and "damaged" in passed[0].reason


def test_a_hole_in_a_tensor_is_an_error(tmp_path: Path) -> None:
    part = {k: v for k, v in fragments(0.0).items() if not k.endswith("@7")}
    commit = save(tmp_path, 1, part)
    with pytest.raises(UserError, match=r"holds 7 elements of weights a\.weight"):
        load.load_state(commit, str(tmp_path / "cache"))


def test_the_commit_names_every_file_with_size_and_digest(tmp_path: Path) -> None:
    url = Path(save(tmp_path, 1).url)
    body = json.loads((url / checkpoint.COMMIT).read_text())
    assert {f["name"] for f in body["files"]} == {p.name for p in url.glob("*.safetensors")}
    assert all(len(f["sha256"]) == 64 and f["size_bytes"] > 0 for f in body["files"])


def test_a_folder_without_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        load.load_weights(str(tmp_path / "nothing"))


def test_weights_are_those_that_were_asked_for_or_none(tmp_path: Path) -> None:
    raw = fragments(1.0)
    save(tmp_path / "raw", 1, raw)
    url = str(tmp_path / "raw")  # a run folder: its newest
    assert load.load_weights(url, "raw")[0]["b.bias"].tolist() == [3.0] * 5
    with pytest.raises(UserError, match="keeps no ema weights"):
        load.load_weights(url, "ema")
    averaged = {key.replace("weights/", "ema/"): tensor + 1 for key, tensor in raw.items()}
    both = save(tmp_path / "both", 1, raw | averaged).url
    assert [float(load.load_weights(both, w)[0]["b.bias"][0]) for w in ("raw", "ema", "evaluated")] == [3, 4, 4]  # type: ignore[arg-type]


def test_a_pickle_is_refused_by_its_name_before_anything_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a pickle by its name"):
        load.resolve(str(tmp_path / "weights.pth"), str(tmp_path / "cache"))
