"""A save alongside training: what it holds, what it waits for, and what it says when it cannot be written."""

import errno
import json
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.checkpoint import commit, direct_io, load, snapshot
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.configuration import from_dict
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.records import Record, Saved, SaveFailed, SaveSkipped
from pipeline.supervision import fault_points
from tests.pipeline import processes

NUMEL = 50_000
FACTS: dict[str, Any] = {
    "samples": 0,
    "num_updates": 0,
    "shapes": {"a": [NUMEL], "b": [NUMEL]},
    "config": {},
    "config_digest": "",
    "dataset": {},
    "classes": [],
    "evaluation": {},
}


def fragments(value: float) -> dict[str, torch.Tensor]:
    return {"weights/a@0": torch.full((NUMEL,), value), "weights/b@0": torch.full((NUMEL,), -value)}


def saver(run_dir: Path, **config: Any) -> Saver:
    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    return Saver(str(run_dir), config=SavingConfig(**config), policy=Policy(), world=alone, taken=set())


def save(mine: Saver, step: int, *, final: bool = True) -> list[Record]:
    return mine.save(step=step, fragments=fragments(step), facts=FACTS, final=final)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Saves stand still after the copy until the event is set."""
    event, main = threading.Event(), threading.current_thread()
    monkeypatch.setattr(fault_points, "hook", lambda _: None if threading.current_thread() is main else event.wait())
    yield event
    event.set()


@pytest.mark.parametrize("file_bytes", [1 << 30, 4 * NUMEL])
def test_the_library_reads_the_files_and_finds_what_was_copied(
    file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "FILE_BYTES", file_bytes)
    state = {"weights/a@0": torch.randn(NUMEL), "ema/b@7": torch.randn(3, 5), "momentum/c@0": torch.zeros(0)}
    for image in snapshot.HostMemory(pin=False).take(state, "x"):
        digest = direct_io.write(tmp_path / image.name, image.memory.numpy().data, image.size_bytes, lambda: None)
        assert (
            digest
            == subprocess.run(
                ["sha256sum", tmp_path / image.name], capture_output=True, text=True, check=True
            ).stdout.split()[0]
        )
    read: dict[str, torch.Tensor] = {}
    for path in tmp_path.iterdir():
        read |= safetensors.torch.load_file(path)
    assert set(read) == set(state) and all(torch.equal(read[k], state[k].flatten()) for k in state)


def test_what_is_saved_is_the_state_at_the_call_whatever_training_does_meanwhile(
    tmp_path: Path, gate: threading.Event
) -> None:
    mine, state = saver(tmp_path), fragments(1.0)
    assert mine.save(step=1, fragments=state, facts=FACTS) == [] and mine.poll() == []
    for tensor in state.values():
        tensor.fill_(9.0)
    gate.set()
    (saved,) = mine.settle()
    assert isinstance(saved, Saved) and mine.newest_step == 1
    weights, _ = load.load_weights(saved.url)
    assert weights["a"].eq(1.0).all() and weights["b"].eq(-1.0).all()


def test_a_save_that_finds_the_one_before_unfinished_is_left_out_counted_and_said(
    tmp_path: Path, gate: threading.Event
) -> None:
    mine = saver(tmp_path, max_wait_s=0.0)
    save(mine, 1, final=False)
    for number in (1, 2):
        (skipped,) = save(mine, 1 + number, final=False)
        assert isinstance(skipped, SaveSkipped) and skipped.num_missed == number and "step 1" in skipped.reason
    gate.set()
    first, last = save(mine, 4)  # a final one waits
    assert isinstance(first, Saved) and isinstance(last, Saved)
    assert (first.step, first.num_missed, last.step, last.num_missed) == (1, 2, 4, 0)


def full_disk(after_bytes: int) -> Any:
    """os.write of a disk that has room for so much."""
    room, write = [after_bytes], os.write

    def call(descriptor: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, memoryview(data)[: room[0]])
        room[0] -= done
        return done

    return call


@pytest.mark.parametrize("room", [0, 4096, 150_001, 300_000])
def test_on_a_full_disk_the_checkpoint_before_stands_and_the_next_save_finds_the_room_again(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = saver(tmp_path)
    save(mine, 1)
    with monkeypatch.context() as patch:
        patch.setattr(direct_io.os, "write", full_disk(room))
        (failed,) = save(mine, 2)
    assert isinstance(failed, SaveFailed) and "no space left for" in failed.reason and failed.num_missed == 1
    found, passed = load.newest(str(tmp_path), str(tmp_path / "cache"))
    assert found is not None and found.step == 1 and not passed
    (saved,) = save(mine, 3)
    assert isinstance(saved, Saved) and saved.num_missed == 1
    assert {p.name[-1] for p in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


def test_a_limit_on_the_size_of_files_is_met_as_a_full_disk_is(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel's own refusal, in the middle of a file
    try:
        (failed,) = save(saver(tmp_path), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(failed, SaveFailed) and "no space left for" in failed.reason
    assert not commit.committed(str(tmp_path))
    assert not list((tmp_path / "checkpoints").glob("step_*"))  # a save that failed leaves nothing of itself


@pytest.mark.parametrize("failing", ["commit.json", "part-00000-of-00001.json"])
def test_a_store_that_refuses_the_last_objects_shows_no_checkpoint(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = commit.objects.write_bytes

    def refusing(url: str, data: bytes) -> None:
        if url.endswith(failing):
            raise OSError("the store does not answer")
        write_bytes(url, data)

    monkeypatch.setattr(commit.objects, "write_bytes", refusing)
    (failed,) = save(saver(tmp_path), 1)
    assert isinstance(failed, SaveFailed) and failed.reason == "the store does not answer"
    assert not commit.committed(str(tmp_path))


def test_a_rank_whose_disk_is_full_is_named_to_all_and_the_next_save_stands(tmp_path: Path) -> None:
    out = processes.run("save_fails.py", tmp_path, num_processes=2)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    kinds = [(r["kind"], r["step"]) for r in lines if "kind" in r]
    assert kinds == [("Saved", 1), ("SaveFailed", 2), ("Saved", 3)]
    failed = next(r for r in lines if r.get("kind") == "SaveFailed")
    assert "rank 1: no space left for" in failed["reason"]
    assert sorted(r["newest"] for r in lines if "newest" in r) == [[0, 1, 1, 3], [1, 1, 1, 3]]  # ranks agree


@pytest.mark.parametrize(
    ("fields", "said"), [({"max_wait_s": -1}, "max_wait_s is -1"), ({"keep_best": -1}, "keep_best is -1")]
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        from_dict(SavingConfig, fields)
