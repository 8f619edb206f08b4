"""The engine computes what one plain process computes, at any sharding."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from nfnet.agc import adaptive_clip_grad_
from nfnet.groups import param_groups
from nfnet.losses import label_smoothing_cross_entropy
from pipeline.engine import Engine, EngineConfig, deepspeed_config
from pipeline.update import OptimConfig
from pipeline.world import join

HERE = Path(__file__).parent


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


processes = load("processes", HERE / "processes.py")
program = load("engine_steps", HERE / "programs" / "engine_steps.py")


def plain(clipping: float = 0.01, skip: int | None = None) -> dict[str, torch.Tensor]:
    """The same steps in plain PyTorch: torch's SGD, AGC on .grad, an average by hand."""
    model = program.network()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1, weight_decay=1e-3), lr=0.1, momentum=0.9, nesterov=True)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    t = 0
    for step in range(program.STEPS):
        if step == skip:
            continue
        images, labels = program.batch(step)
        optimizer.zero_grad()
        label_smoothing_cross_entropy(model(images), labels).backward()
        if clipping:
            adaptive_clip_grad_(model.named_parameters(), clipping=clipping)
        optimizer.step()
        keep = min(0.9, (1 + t) / (10 + t))
        for n, p in model.named_parameters():
            average[n].mul_(keep).add_((1 - keep) * p.detach())
        t += 1
    momenta = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {
        f"{kind}/{n}": v
        for kind, values in (("weights", weights), ("momentum", momenta), ("ema", average))
        for n, v in values.items()
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return plain()


def distance(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: str) -> float:
    return max(float((state[k] - v).abs().max()) for k, v in expected.items() if k.startswith(kind))


CASES = [(0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2)]


@pytest.mark.parametrize(("stage", "ranks", "accumulation"), CASES)
def test_ten_steps_equal_one_plain_process(
    stage: int, ranks: int, accumulation: int, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    options = {"stage": stage, "accumulation": accumulation}
    processes.run("engine_steps.py", tmp_path / "out.pt", options, num_processes=ranks)
    found = torch.load(tmp_path / "out.pt")
    assert distance(found["state"], expected, "weights") < 1e-6
    assert distance(found["state"], expected, "ema") < 1e-6
    assert distance(found["state"], expected, "momentum") < 1e-5
    assert all(0 < s["clipped_share"] < 1 for s in found["stats"])
    if stage == 1 and ranks == 2:  # no rank holds more than its share, padding aside
        assert found["held"] < 0.55 * sum(v.numel() for v in expected.values())


def test_clipping_changes_the_outcome(expected: dict[str, torch.Tensor]) -> None:
    """Or the equality above would prove nothing about AGC."""
    assert distance(plain(clipping=0.0), expected, "weights") > 1e-3


@pytest.mark.parametrize("stage", [0, 1])
def test_a_batch_that_is_not_finite_on_one_rank_is_left_out_on_all(stage: int, tmp_path: Path) -> None:
    options = {"stage": stage, "accumulation": 2, "poison_step": 4}
    processes.run("engine_steps.py", tmp_path / "out.pt", options, num_processes=2)
    found = torch.load(tmp_path / "out.pt")
    assert [s["applied"] for s in found["stats"]] == [s != 4 for s in range(program.STEPS)]
    assert distance(found["state"], plain(skip=4), "weights") < 1e-6


def test_bf16_keeps_fp32_weights_and_stays_near(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    options = {"stage": 1, "accumulation": 1, "precision": "bf16"}
    processes.run("engine_steps.py", tmp_path / "out.pt", options)
    found = torch.load(tmp_path / "out.pt")
    assert {v.dtype for v in found["state"].values()} == {torch.float32}
    assert 1e-6 < distance(found["state"], expected, "weights") < 3e-2


def alone(model: torch.nn.Module) -> Engine:
    return Engine(
        model,
        optim=OptimConfig(learning_rate=0.1),
        config=EngineConfig(),
        world=join(),
        micro_batch=4,
        accumulation=1,
    )


def test_a_batch_learnt_by_heart_has_no_gradient_and_that_is_no_fault() -> None:
    model = program.network()
    with torch.no_grad():
        model.head.bias[3] = 1e4
    engine = alone(model)
    engine.forward_backward(torch.randn(4, 3, 32, 32), torch.full((4,), 3), is_last=True)
    stats = engine.update(0.1)
    assert stats.applied and stats.loss == 0.0 and stats.gradient_norm == 0.0
    engine.close()


def test_a_loss_whose_gradient_is_lost_stops_the_run() -> None:
    engine = alone(program.network())
    engine.forward_backward(torch.randn(4, 3, 32, 32), torch.full((4,), 3), is_last=True)
    for parameter in engine.network.parameters():
        parameter.grad.zero_()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="saw no gradient at all"):
        engine.update(0.1)
    engine.close()


def test_the_library_is_told_not_to_clip() -> None:
    config = deepspeed_config(EngineConfig(zero_stage=1), global_batch=64, micro_batch=8, accumulation=4)
    assert config["gradient_clipping"] == 0.0
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (64, 8)
