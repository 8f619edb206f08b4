"""`micro_batch: auto` on the twin of a device that has little memory."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nfnet.analysis.step_profile import StepProfile, step_profile
from pipeline.data.loading.datasets import DataConfig
from pipeline.distributed import ALONE, World, leave
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.fitting import micro_batch
from pipeline.fitting.micro_batch import Asked, Fit, find, largest
from pipeline.models.backbone import ModelConfig, make
from pipeline.records import Changed, Record, Started
from pipeline.training import identity
from pipeline.training.check_run import check_network
from pipeline.training.run import Run, load_yaml, override
from pipeline.training.train import train
from tests.pipeline.training.test_train import make_run, state

ASKED = Asked(
    model=ModelConfig(name="nfnet_tiny"),
    num_classes=10,
    image_px=32,
    optim=OptimConfig(learning_rate=0.1),
    engine=EngineConfig(),
    global_batch=64,
    candidates=[64, 32, 16, 8],
)


@lru_cache
def profiled(px: int, **how: Any) -> StepProfile:
    with torch.device("meta"):
        network = make(ASKED.model.name, ASKED.num_classes, {})
    return step_profile(network, px, **how)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is the same in all of them, and its profile takes a second."""
    monkeypatch.setattr(micro_batch, "step_profile", lambda _, px, **how: profiled(px, **how))


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(micro_batch, "available_bytes", lambda: int(num_bytes))


def held(asked: Asked, micro: int) -> int:
    return micro_batch._Held(asked, ALONE).bytes(micro)


def test_on_a_cpu_the_largest_is_taken_that_the_estimate_finds_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for micro in (32, 8):
        room = held(ASKED, micro) / micro_batch.CPU_SHARE
        free(monkeypatch, room + 2)
        fit = find(ASKED, ALONE)
        assert fit.micro_batch == micro and "80% of what is free" in fit.text
        free(monkeypatch, room - 2)
        if micro > 8:
            assert find(ASKED, ALONE).micro_batch == micro // 2


def test_where_nothing_fits_one_sentence_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.replace(ASKED, image_px=64, candidates=[64])
    again = dataclasses.replace(asked, engine=EngineConfig(activation_checkpointing=True))
    free(monkeypatch, held(again, 64) / micro_batch.CPU_SHARE + 2)
    with pytest.raises(UserError, match=r"not even 64 images .*; engine\.activation_checkpointing true would fit"):
        find(asked, ALONE)
    third = EngineConfig(activation_checkpointing=True, checkpointed_every=3)
    with pytest.raises(UserError, match=r"; engine\.checkpointed_every 1 would fit"):
        find(dataclasses.replace(asked, engine=third), ALONE)
    free(monkeypatch, 1e6)
    for engine in (EngineConfig(), EngineConfig(compile="network")):  # which stage 3 does not take
        with pytest.raises(UserError, match="no ZeRO stage and no checkpointing makes it fit; use more"):
            find(dataclasses.replace(asked, engine=engine), ALONE)


def test_a_device_that_runs_out_of_memory_does_not_fit() -> None:
    """The trial itself, on the twin: its passes are those of the run, and a limit is an allocation that fails."""
    trial = micro_batch._Trial(ASKED, ALONE, micro_batch._Held(ASKED, ALONE))
    tried: list[int] = []

    def fits(micro: int) -> bool:
        tried.append(micro)
        if micro > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trial.fits(micro)

    assert largest(ASKED.candidates, fits) == 16 and tried == [64, 32, 16]
    assert all(p.grad is None for p in trial._objective.parameters())

    def never(micro: int) -> bool:
        raise torch.OutOfMemoryError

    assert largest(ASKED.candidates, never) == 0


def test_all_ranks_take_the_least_that_any_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1e12)
    monkeypatch.setattr(micro_batch.distributed, "gather", lambda world, mine: [mine, (16, 5), (32, 7)])
    two = World(rank=0, size=4, local_rank=0, device=torch.device("cpu"))
    assert find(dataclasses.replace(ASKED, candidates=[16, 8]), two).micro_batch == 16
    monkeypatch.setattr(micro_batch.distributed, "gather", lambda world, mine: [mine, (0, 5)])
    with pytest.raises(UserError, match="not even 8 images"):
        find(dataclasses.replace(ASKED, candidates=[16, 8]), two)


def test_what_may_be_taken_divides_what_must_be_whole() -> None:
    run = make_run("", global_batch=48, micro_batch="auto")
    assert run.micro_batches(2) == [24, 12, 8, 6, 4, 3, 2, 1] and run.batch_plan(2) == (24, 1)
    mixed = override(run, {"augment.mixup_alpha": 0.2, "augment.cutmix_alpha": 0.2})
    assert mixed.micro_batches(2) == [24, 12, 8, 4]
    with pytest.raises(UserError, match="no part of the 3 samples"):
        mixed.micro_batches(16)
    with pytest.raises(UserError, match="micro_batch"):
        override(run, {"micro_batch": "much"})


def test_a_run_writes_down_what_it_found_and_keeps_it(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = str(tmp_path / "run"), []

    def found(asked: Any, world: World) -> Fit:
        calls.append(asked.candidates)
        return Fit(micro_batch=8, text="micro_batch auto: 8 images")

    monkeypatch.setattr("pipeline.training.train.find", found)

    def records(run: Run) -> list[Record]:
        try:
            return [*train(run, out)]
        finally:
            leave()

    engine = EngineConfig(parity_check=False)
    data = DataConfig(url=digits, mix_blocks=4, block_mb=0.01, eval_split=None)
    run = make_run(digits, micro_batch="auto", data=data, engine=engine, duration=Duration(4, "steps"), save_every=None)
    first = records(run)
    again = records(dataclasses.replace(run, duration=Duration(5, "steps")))
    assert calls == [[16, 8, 4, 2, 1]]  # once
    for these, text in ((first, "8 images"), (again, "as at an earlier start of this run on 1 processes")):
        (started,) = (r for r in these if isinstance(r, Started))
        assert (started.micro_batch, started.accumulation, started.config["micro_batch"]) == (8, 2, 8)
        assert any(isinstance(r, Changed) and r.what == "micro_batch" and text in r.text for r in these)
    written = identity.read(out)
    assert written is not None and written.micro_batches == {"1": 8}
    assert load_yaml((tmp_path / "run" / "run.yaml").read_bytes(), "run.yaml").micro_batch == 8
    other = make_run(digits, micro_batch=8, data=data, engine=engine, duration=Duration(5, "steps"), save_every=None)
    out = str(tmp_path / "other" / "run")
    records(other)
    ours, theirs = state(tmp_path)[0], state(tmp_path / "other")[0]
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("part", [{"checkpointed_share": 0.5}, {"checkpointed_every": 2}])
def test_a_part_of_the_blocks_is_refused_where_blocks_are_not_known(digits: str, part: dict[str, Any]) -> None:
    (name,) = part
    with pytest.raises(UserError, match=rf"set that to true, or engine\.{name} to 1"):
        EngineConfig(**part)
    pytest.importorskip("timm")
    engine = EngineConfig(activation_checkpointing=True, **part)
    run = make_run(digits, model=ModelConfig(name="timm:resnet10t"), engine=engine)
    with pytest.raises(
        UserError, match=rf"engine\.{name} is .*, and only our own networks say what their blocks are; set it to 1"
    ):
        check_network(run)
    whole = dataclasses.replace(run, engine=EngineConfig(activation_checkpointing=True))
    check_network(whole)
    vgg = dataclasses.replace(whole, model=ModelConfig(name="timm:vgg11"))
    with pytest.raises(
        UserError, match=r"cannot recompute its blocks .*; set engine\.activation_checkpointing to false"
    ):
        check_network(vgg)
