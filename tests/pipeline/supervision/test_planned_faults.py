"""What NORMFREE_FAULTS plans happens at its point, to its rank, and in no run without it."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.supervision import fault_points, planned_faults
from pipeline.supervision.fault_points import STEP, reach


@pytest.fixture(autouse=True)
def _no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_points, "hook", None)
    monkeypatch.delenv(planned_faults.VARIABLE, raising=False)


def plan(monkeypatch: pytest.MonkeyPatch, rank: int = 0, **fault: Any) -> None:
    fault = {"rank": 0, "point": STEP, "first": 2, "last": 2, **fault}
    monkeypatch.setenv(planned_faults.VARIABLE, json.dumps([fault]))
    planned_faults.arm(rank)


def test_without_the_variable_nothing_is_armed() -> None:
    planned_faults.arm(0)
    assert fault_points.hook is None


def test_a_full_disk_is_met_in_its_save_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(monkeypatch, point="file opened", do="full")
    for save in (1, 2, 3):
        reach("copied")
        if save != 2:
            reach("file opened")
            continue
        with pytest.raises(OSError) as refused:
            reach("file opened")
        assert refused.value.errno == errno.ENOSPC
    assert "part of a drill" in capsys.readouterr().err


def test_another_rank_meets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, rank=1, point="file opened", first=0, last=9, do="full")
    reach("copied")
    reach("file opened")


def test_one_batch_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, do="nan")
    layer = torch.nn.Linear(2, 1)
    finite = []
    for _ in range(3):
        reach(STEP)
        finite += [bool(layer(torch.ones(1, 2)).isfinite().all()) for _ in range(2)]
    assert finite == [True, True, False, True, True, True]


def test_a_rank_stands_still_until_it_is_told_to_go_and_never_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "held"
    plan(monkeypatch, first=1, last=1, do="hold", file=str(file))
    thread = threading.Thread(target=reach, args=(STEP,), daemon=True)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and file.read_text() == f"{os.getpid()}\n"
    (tmp_path / f"held{planned_faults.GO}").touch()
    thread.join(30)
    assert not thread.is_alive()
    (tmp_path / f"held{planned_faults.GO}").unlink()
    planned_faults.arm(0)  # the process that is started in its place
    reach(STEP)


@pytest.mark.parametrize(
    "text", ["yes", "[1]", '[{"rank": 0}]', '[{"rank":0,"point":"lunch","first":1,"last":1,"do":"full"}]']
)
def test_a_plan_without_a_meaning_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(planned_faults.VARIABLE, text)
    with pytest.raises(UserError, match=r"NORMFREE_FAULTS.*unset it"):
        planned_faults.arm(0)
