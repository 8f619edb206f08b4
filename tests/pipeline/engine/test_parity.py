"""The guard at the start of a run: it agrees with the library that is installed, and refuses one that computes otherwise."""

import importlib.metadata
from typing import Any

import pytest

from pipeline.distributed import join, leave
from pipeline.engine import deepspeed_engine, parity_check
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.errors import UserError


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_installed_library_agrees(stage: Any, precision: Any) -> None:
    config = EngineConfig(zero_stage=stage, precision=precision)
    worst = parity_check.check(config, world=join(), accumulation=2)
    assert worst < parity_check.TOLERANCE[precision] / 2


def test_what_was_found_once_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parity_check.check(EngineConfig(), world=join(), accumulation=1)
    monkeypatch.setattr(parity_check, "Engine", None)
    assert parity_check.check(EngineConfig(), world=join(), accumulation=1) == 0.0


def wrong_mean(config: dict[str, Any]) -> None:
    """Gradients averaged over twice the micro-batches that there are."""
    config["gradient_accumulation_steps"] *= 2
    config["train_batch_size"] *= 2


@pytest.mark.parametrize("stage", [0, 2])
def test_a_library_that_disagrees_is_refused_by_name_and_number(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    derive = deepspeed_engine.deepspeed_config

    def wrong(*args: Any, **options: Any) -> dict[str, Any]:
        config = derive(*args, **options)
        wrong_mean(config)
        return config

    monkeypatch.setattr(deepspeed_engine, "deepspeed_config", wrong)
    monkeypatch.setattr(parity_check, "_agreed", set())
    version = importlib.metadata.version("deepspeed")
    with pytest.raises(UserError, match=rf"deepspeed {version} .* at engine\.zero_stage {stage}"):
        parity_check.check(EngineConfig(zero_stage=stage), world=join(), accumulation=1)


@pytest.mark.parametrize("stage", [0, 1])
def test_clipping_that_is_left_out_is_noticed(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.engine.Engine._clip", lambda *_: None)
    monkeypatch.setattr(parity_check, "_agreed", set())
    with pytest.raises(UserError, match="otherwise than plain PyTorch"):
        parity_check.check(EngineConfig(zero_stage=stage), world=join(), accumulation=1)


def test_a_process_may_leave_its_group_and_train_again() -> None:
    for _ in range(2):
        parity_check._agreed.clear()
        assert parity_check.check(EngineConfig(), world=join(), accumulation=1) < parity_check.TOLERANCE["fp32"] / 2
        leave()
