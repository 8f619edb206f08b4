"""A last state that its place does not take is kept on this machine, and the next start hands it in."""

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import saver as saver_module
from pipeline.checkpoint import unsaved
from pipeline.checkpoint.commit import committed
from pipeline.checkpoint.load import load_state, newest
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.distributed import World
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig
from pipeline.records import Finished, Notice, Record, Started, Step, Stopped
from pipeline.supervision.hang_detection import WatchdogConfig
from pipeline.supervision.stop_signals import StopSignal
from pipeline.training.run import Run
from pipeline.training.train import train

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
plain_write = saver_module.write_part


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unsaved"


@pytest.fixture
def run(digits: str) -> Run:
    return Run(
        name="test",
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(url=digits, eval_split=None),
        augment=AugmentConfig(image_px=16),
        optim=OptimConfig(learning_rate=0.1, ema_decay=0.9),
        engine=EngineConfig(parity_check=False),
        global_batch=8,
        duration=Duration(3, "steps"),
    )


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hangs(url: str, *_: Any, give_up: Any, **__: Any) -> None:
    give_up.wait(60)


def test_the_next_start_hands_in_what_was_kept(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "run")
    monkeypatch.setattr(saver_module, "write_part", full)
    with pytest.raises(UserError, match=r"all 3 steps are done.*no space left.*is kept in .*step_00000003"):
        list(train(run, out))
    (folder,) = cache.iterdir()
    kept = newest(str(folder), "")[0]
    assert kept is not None and committed(out) == [] and (folder.stat().st_mode & 0o777) == 0o700
    state = load_state(kept, "")
    monkeypatch.setattr(saver_module, "write_part", plain_write)
    records = list(train(run, out))
    (started,) = [r for r in records if isinstance(r, Started)]
    assert started.step == 3 and isinstance(records[-1], Finished) and not list(cache.iterdir())
    assert any("was kept in" in r.text for r in records if isinstance(r, Notice))
    found = newest(out, "")[0]
    assert found is not None and found.digest == kept.digest and found.url == records[-1].checkpoint
    after = load_state(found, "")
    assert set(after) == {"weights", "momentum", "ema"}
    assert all((after[k][n] == state[k][n]).all() for k in after for n in after[k])


def test_a_stop_leaves_time_to_keep_what_the_store_does_not_take(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "write_part", hangs)
    run = dataclasses.replace(
        run, duration=Duration(500, "steps"), log_every_steps=1, watchdog=WatchdogConfig(grace_s=10)
    )

    def asked() -> Iterator[Record]:
        with StopSignal(grace_s=10) as stop:
            for record in train(run, str(tmp_path / "run"), stop=stop):
                if isinstance(record, Step):
                    stop.ask()
                yield record

    last = list(asked())[-1]
    assert isinstance(last, Stopped) and "is kept in" in last.reason
    assert newest(str(next(cache.iterdir())), "")[0] is not None


def test_a_state_of_another_run_or_of_a_folder_that_was_emptied_is_not_handed_in(
    run: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(saver_module, "write_part", full)
    with pytest.raises(UserError):
        list(train(run, str(out)))
    monkeypatch.setattr(saver_module, "write_part", plain_write)
    shutil.rmtree(out)
    records = list(train(dataclasses.replace(run, seed=1), str(out)))
    assert next(r for r in records if isinstance(r, Started)).step == 0
    assert any("is of another run" in r.text for r in records if isinstance(r, Notice)) and len(list(cache.iterdir()))


def test_a_state_that_has_no_room_is_said_to_be_lost(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsaved, "ROOM", 1e18)
    images = saver_module.HostMemory(pin=False).take({"weights/a@0": torch.zeros(3)}, "fragments")
    assert "could not be kept" in unsaved.keep("s3://bucket/run", images, step=1, facts={"evaluation": {}})
    assert not list(cache.glob("*/checkpoints"))


def test_a_good_end_waits_for_the_save_in_flight_and_an_error_does_not_for_long() -> None:
    for error, is_given_up in ((None, False), (ValueError, True)):
        config = saver_module.SavingConfig(max_wait_s=0.0)
        saver = saver_module.Saver("run", config=config, policy=saver_module.Policy(), world=ALONE, taken=set())
        saver._work = work = saver_module._Work("run/checkpoints/step_00000001", 1, "", 0.0)
        saver.__exit__(error)
        assert work.give_up.is_set() == is_given_up
