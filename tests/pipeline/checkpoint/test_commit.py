"""Commit files: what is written, what is refused, and which checkpoint is the newest."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint import commit
from pipeline.errors import UserError

FILE = {"name": "part.safetensors", "size_bytes": 1, "sha256": "0" * 64}


def write(folder: Path, **changes: Any) -> commit.Commit:
    facts = {
        "samples": 8,
        "num_updates": 2,
        "shapes": {},
        "config": {},
        "config_digest": "c",
        "dataset": {},
        "classes": [],
    }
    facts["evaluation"] = {"top1": 0.5, "loss": math.nan, "top5": math.inf}
    files: Any = [FILE]
    folder.mkdir(parents=True, exist_ok=True)
    return commit.write_commit(str(folder), step=2, kinds=["weights"], files=files, facts={**facts, **changes})


def test_scores_that_are_no_numbers_are_left_out_and_all_else_is_read_back(tmp_path: Path) -> None:
    made = write(tmp_path)
    assert made.evaluation == {"top1": 0.5} and commit.read_commit(str(tmp_path)) == made
    assert (made.step, made.samples, made.num_updates, made.size_bytes, made.files) == (2, 8, 2, 1, [FILE])
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path / "x", dataset={"share": math.nan})


def test_buffers_have_the_types_that_safetensors_has(tmp_path: Path) -> None:
    """By what the library itself writes."""
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8)
    tensors = {
        str(kind): torch.zeros(2, dtype=kind) for kind in (*kinds, torch.int64, torch.int32, torch.int16, torch.int8)
    }
    save_file(tensors, tmp_path / "all.safetensors")
    data = (tmp_path / "all.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    buffers = {name: header[name]["dtype"] for name in tensors}
    made = write(tmp_path, shapes={name: [2] for name in tensors}, buffers=buffers)
    assert made.buffers == buffers and set(buffers.values()) == set(get_args(commit.BufferType))
    with pytest.raises(UserError, match="use another checkpoint"):
        write(tmp_path, buffers={"a": "F8"})


@pytest.mark.parametrize("found", [True, 1.0, "1", None, 2])
def test_a_format_is_that_very_number(found: Any, tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / commit.COMMIT
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": found}))
    with pytest.raises(UserError, match="this version reads 1; use another checkpoint, or the version that wrote it"):
        commit.read_commit(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("files", [FILE, FILE], "a file is named twice"),
        ("kinds", ["ema", "ema"], "a kind is named twice"),
        ("files", [{**FILE, "name": "part.pt"}], r"names 'part\.pt', .* nothing of it was read"),
        ("kinds", [], "kinds"),
    ],
)
def test_a_commit_that_names_something_twice_or_wrongly_is_refused(
    field: str, value: Any, words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    file = tmp_path / commit.COMMIT
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(UserError, match=words):
        commit.read_commit(str(tmp_path))


def test_a_folder_without_a_commit_or_with_an_endless_one_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no commit\.json; give a checkpoint or a run folder"):
        commit.read_commit(str(tmp_path))
    with (tmp_path / commit.COMMIT).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="use another checkpoint"):
        commit.read_commit(str(tmp_path))


def test_the_newest_checkpoint_is_that_of_the_largest_step_and_its_last_attempt(tmp_path: Path) -> None:
    run = str(tmp_path)
    urls = [
        commit.checkpoint_url(run, step, attempt)
        for step, attempt in [(7, 1), (10**8, 1), (10**8 - 1, 1), (7, 2), (7, 11), (0, 1)]
    ]
    for url in [*urls, f"{run}/checkpoints/by_hand"]:
        write(Path(url))
    names = [url.rsplit("/", 1)[-1] for url in commit.committed(run)]
    assert names == [
        "step_100000000",
        "step_99999999",
        "step_00000007_11",
        "step_00000007_02",
        "step_00000007",
        "step_00000000",
        "by_hand",
    ]
    assert commit.checkpoint_url(run, 7) == urls[0]
    assert commit.place_in_order(f"{run}/step_00000012/") == (12, 1) and commit.place_in_order("step_1x") is None


@pytest.mark.parametrize("name", ["a.pt", "a.PTH", "a.ckpt", "a.pkl", "a.pickle", "a.bin"])
def test_a_pickle_is_known_by_its_name(name: str) -> None:
    with pytest.raises(UserError, match="may run code"):
        commit.refuse_pickle(f"s3://bucket/{name}")
    commit.refuse_pickle(f"{name}.safetensors")
