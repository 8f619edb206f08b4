"""What stays of a run's checkpoints: by the rules, by a pin, by damage; wherever the deleting is interrupted."""

from pathlib import Path

import pytest

from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import retention
from pipeline.checkpoint.retention import Kept, Policy, retain, to_delete
from pipeline.errors import UserError
from pipeline.records import PassedOver
from pipeline.supervision import fault_points

FACTS = {"samples": 1, "num_updates": 1, "shapes": {}, "config": {}, "config_digest": "", "dataset": {}, "classes": []}


def commit(run_dir: Path, step: int, top1: float = 0.0, attempt: int = 1) -> Path:
    url = checkpoint.checkpoint_url(str(run_dir), step, attempt)
    Path(url).mkdir(parents=True)
    (Path(url) / "fragments-00000-of-00001.safetensors").write_bytes(b"x")
    facts = {**FACTS, "evaluation": {"top1": top1, "loss": -top1}}
    checkpoint.write_commit(url, step=step, kinds=["weights"], files=[], facts=facts)
    return Path(url)


def step_folder(run_dir: Path, step: int) -> Path:
    return Path(checkpoint.checkpoint_url(str(run_dir), step))


def steps(run_dir: Path) -> list[int]:
    return sorted(int(u.rsplit("_", 1)[-1]) for u in checkpoint.committed(str(run_dir)))


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        (Policy(last=2), [5, 6]),
        (Policy(last=1, every_steps=3), [3, 6]),
        (Policy(last=1, best=2), [2, 4, 6]),
        (Policy(last=1, best=2, metric="loss"), [2, 4, 6]),
        (Policy(last=9), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_newest_the_round_and_the_best_stay(policy: Policy, left: list[int], tmp_path: Path) -> None:
    for step, top1 in enumerate((0.1, 0.9, 0.2, 0.8, 0.3, 0.1), start=1):
        commit(tmp_path, step, top1)
    retain(str(tmp_path), policy)
    assert steps(tmp_path) == left == sorted(int(p.name[-1]) for p in (tmp_path / "checkpoints").iterdir())


def test_of_equal_evaluations_the_first_is_the_best() -> None:
    found = [Kept(f"step_{n}", (n, 1), False, {"top1": 0.5}) for n in range(1, 5)]
    assert to_delete(found, Policy(last=1, best=1)) == ["step_2", "step_3"]


def test_a_pinned_checkpoint_survives_every_setting_and_a_damaged_one_is_no_newest(tmp_path: Path) -> None:
    folders = [commit(tmp_path, step) for step in range(1, 6)]
    retention.pin(str(folders[0]), "sweep of Tuesday")
    retention.mark_damaged(PassedOver(step=0, url=str(folders[4]), reason="does not verify"))
    retain(str(tmp_path), Policy(last=1))
    assert steps(tmp_path) == [1, 4, 5]  # 5 is kept for inspection, 4 is the newest that stands
    with pytest.raises(UserError, match="no checkpoint"):
        retention.pin(str(folders[1]), "too late")
    assert not folders[1].exists() or not list(folders[1].iterdir())


def test_leftovers_go_when_they_are_older_than_the_newest_commit(tmp_path: Path) -> None:
    for step in (1, 3, 5):
        (commit(tmp_path, step) / checkpoint.COMMIT).unlink()
    commit(tmp_path, 3, attempt=2)
    (tmp_path / "checkpoints" / "step_00000002").mkdir()  # killed before its first byte
    (tmp_path / "checkpoints" / "notes").mkdir()
    retain(str(tmp_path), Policy(last=1), in_flight=checkpoint.checkpoint_url(str(tmp_path), 1))
    left = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_00000001", "step_00000003_02", "step_00000005", "notes"}


@pytest.mark.parametrize(
    ("point", "call"),
    [("retention", 1), ("commit deleted", 1), ("commit deleted", 2), ("files deleted", 1), ("files deleted", 2)],
)
def test_interrupted_anywhere_it_leaves_no_half_checkpoint_and_ends_the_work_later(
    point: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 5):
        commit(tmp_path, step)
    seen = []

    def die(reached: str) -> None:
        seen.append(reached)
        if seen.count(point) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fault_points, "hook", die)
        with pytest.raises(KeyboardInterrupt):
            retain(str(tmp_path), Policy(last=2))
    assert {3, 4} <= set(steps(tmp_path))
    if point == "commit deleted":  # before any file of it, and oldest first
        assert steps(tmp_path) == list(range(call + 1, 5)) and list(step_folder(tmp_path, call).iterdir())
    whole = [Path(u) / "fragments-00000-of-00001.safetensors" for u in checkpoint.committed(str(tmp_path))]
    assert all(p.exists() for p in whole)  # what is committed has its files
    retain(str(tmp_path), Policy(last=2))
    assert {p.name[-1] for p in (tmp_path / "checkpoints").iterdir()} == {"3", "4"}


@pytest.mark.parametrize("spelling", ["run", "./run", "run/", "file://{}/run"])
def test_what_is_kept_does_not_depend_on_how_the_folder_is_spelled(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in range(1, 5):
        commit(Path("run"), step)
    retention.pin(str(step_folder(Path("run"), 1)), "a sweep needs it")
    retain(spelling.format(tmp_path), Policy(last=2))
    assert steps(Path("run")) == [1, 3, 4]
