"""What is said to be fp32 in a bf16 run is fp32, at the places that are named, and the rest is bf16."""

from typing import Any

import pytest
import torch
from torch import nn

import nfnet
from nfnet.layers import WSConv2d
from nfnet.optim.losses import MixedLabels
from pipeline.distributed import World, join
from pipeline.engine.deepspeed_engine import EngineConfig, Objective
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from tests.pipeline.programs import engine_steps as program

IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.arange(4)
STAGES = (0, 1, 2, 3)


def watch(network: nn.Module) -> dict[str, torch.dtype]:
    """Type of each module's first input ("name<") and output ("name>") in passes to come."""
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            seen[f"{name}<"], seen[f"{name}>"] = inputs[0].dtype, output.dtype

        return hook

    for name, module in network.named_modules():
        if not list(module.children()) and isinstance(module, nn.Linear | WSConv2d):
            module.register_forward_hook(note(name))
    return seen


@pytest.mark.parametrize("labels", [LABELS, MixedLabels(LABELS, LABELS, torch.full((4,), 0.7))])
def test_head_loss_and_pooled_features_are_fp32_and_convolutions_are_bf16(labels: Any) -> None:
    network = program.network()
    seen = watch(network)
    loss, _ = Objective(network, OptimConfig(learning_rate=0.1), "bf16")(IMAGES, labels)
    assert (seen["head<"], seen["head>"], loss.dtype) == (torch.float32,) * 3
    assert {seen[name] for name in seen if "conv" in name and name.endswith(">")} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert network(IMAGES).dtype == torch.float32
        assert network.forward_head(network.forward_features(IMAGES), pre_logits=True).dtype == torch.float32


def test_a_comparison_networks_head_is_fp32_too() -> None:
    pytest.importorskip("timm")
    from pipeline.models import timm_models

    network = timm_models.make("timm:convnext_atto", 7, {})
    seen = watch(network)
    Objective(network, OptimConfig(learning_rate=0.1), "bf16")(IMAGES, LABELS)
    assert (seen["head<"], seen["head>"]) == (torch.float32,) * 2


@pytest.mark.parametrize("stage", STAGES)
def test_weights_gradients_momentum_averages_and_evaluated_logits_are_fp32(
    stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world: World = join()
    optim = OptimConfig(learning_rate=0.1, ema_decay=0.9)
    config = EngineConfig(precision="bf16", zero_stage=stage, parity_check=False)
    engine = Engine(program.network(), optim=optim, config=config, world=world, micro_batch=4, accumulation=2)
    gradients: set[torch.dtype] = set()
    plain = engine._layout.gradients

    def noted(places: Any) -> Any:
        found = plain(places)
        gradients.update(t.dtype for t in found)
        return found

    monkeypatch.setattr(engine._layout, "gradients", noted)
    for is_last in (False, True):
        engine.forward_backward(IMAGES, LABELS, is_last=is_last)
    engine.update(0.1)
    assert gradients == {torch.float32}
    fragments = engine.local_fragments()
    assert {key.split("/")[0] for key in fragments} == {"weights", "momentum", "ema"}
    assert {t.dtype for t in fragments.values()} == {torch.float32}
    with engine.evaluation_network() as (network, _), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(IMAGES).dtype == torch.float32
    engine.close()


def test_whoever_evaluates_computes_in_fp32() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    join()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("tf32", [True, False])  # flags of the process: it ends with fp32
def test_fp32_is_rounded_to_tf32_on_demand_only(tf32: bool) -> None:
    flags = [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]
    for owner, name in flags:
        setattr(owner, name, not tf32)
    torch.backends.cudnn.benchmark = False
    optim, config = OptimConfig(learning_rate=0.1), EngineConfig(tf32=tf32)
    engine = Engine(program.network(), optim=optim, config=config, world=join(), micro_batch=4, accumulation=1)
    engine.close()
    assert [getattr(owner, name) for owner, name in flags] == [tf32, tf32] and torch.backends.cudnn.benchmark


def test_weights_are_standardised_in_fp32_and_rounded_once() -> None:
    conv = WSConv2d(8, 16, 3)
    with torch.no_grad():
        conv.weight.add_(3.0)  # far from zero: a mean that were taken in bf16 would be wrong in the second digit
    weight = nfnet.functional.standardised(conv.weight, conv.gain)
    x = torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = conv(x)
    expected = nn.functional.conv2d(x.bfloat16(), weight.bfloat16(), conv.bias.bfloat16(), padding=1)
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=2e-2)


def test_one_step_never_waits_for_the_device_by_the_librarys_own_will(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    engine = Engine(
        program.network(),
        optim=OptimConfig(learning_rate=0.1),
        config=EngineConfig(),
        world=join(),
        micro_batch=4,
        accumulation=2,
    )
    waits: list[int] = []
    for step in range(4):  # the library's timer begins with the third
        monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_, s=step: waits.append(s))
        for is_last in (False, True):
            engine.forward_backward(IMAGES, LABELS, is_last=is_last)
        engine.update(0.1)
    assert not waits
    engine.close()
