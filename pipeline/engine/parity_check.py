"""Before a run: does the engine, as it is installed here, compute what plain PyTorch computes?

Updates of the training library have changed gradients without a word before (averages over ranks, accumulation, clipping
that came on by itself). So steps of a tiny network at the run's own stage, precision, accumulation and number of ranks are
compared with SGD, AGC on whole gradients and an average written out in plain PyTorch. Seconds, once a process.
"""

import importlib.metadata
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

import nfnet
from nfnet.optim.losses import label_smoothing_cross_entropy
from nfnet.optim.param_groups import param_groups
from nfnet.variants import Variant
from pipeline.distributed import World
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError

LIBRARY = "deepspeed"
NUM_STEPS, MICRO_BATCH, MAX_ACCUMULATION = 3, 2, 2
OPTIM = OptimConfig(learning_rate=0.5, weight_decay=0.01, ema_decay=0.5, label_smoothing=0.1)
NETWORK = Variant(
    name="parity", depths=(1,), widths=(12,), strides=(2,), stem_widths=(5,), stem_strides=(2,), group_width=3
)
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Of a parameter's largest change: what sums taken in another order differ by, and what bf16 then rounds otherwise."""

_agreed: set[tuple[object, ...]] = set()


def check(config: EngineConfig, *, world: World, accumulation: int) -> float:
    """The largest difference, as a share of the largest change; 0 if it was found before, or is not asked for.

    Every rank calls this. Raises UserError, on all ranks, naming the library's version, if the difference is too large.
    """
    # Compiled passes are compared with eager ones where they are compiled (`pipeline.compilation`).
    config = replace(config, parity_check=False, compile="none", cuda_graphs=False)
    accumulation = min(accumulation, MAX_ACCUMULATION)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in (LIBRARY, "torch")]
    key = (*versions, config, world, accumulation)
    if key in _agreed:
        return 0.0
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(0)
        network = _network()
        start = {n: p.detach().to(world.device, copy=True) for n, p in network.named_parameters()}
        ours = _engine_steps(network, config, world, accumulation)
        expected = _plain_steps(start, config.precision, world, accumulation)
    worst = max(_distance(ours[kind], expected[kind], start) for kind in ("weights", "ema"))
    if not worst <= TOLERANCE[config.precision]:  # not finite is refused too
        raise UserError(
            f"{' with '.join(versions)} updates weights otherwise than plain PyTorch does at engine.zero_stage "
            f"{config.zero_stage}, {config.precision}, accumulation {accumulation} and {world.size} processes (by "
            f"{worst:.1e} of the change); install the versions of constraints.txt, or set engine.parity_check to false"
        )
    _agreed.add(key)
    return worst


def _network() -> nn.Module:
    network = nfnet.NFNet(NETWORK, 7)
    for name, parameter in network.named_parameters():
        if name.endswith("skip_gain"):  # 0 would leave the branch's weights without a gradient to compare
            nn.init.constant_(parameter, 0.5)
    return network


def _batch(step: int, micro: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """A micro-batch of this rank."""
    generator = torch.Generator().manual_seed((step * MAX_ACCUMULATION + micro) * world.size + world.rank)
    images = torch.randn(MICRO_BATCH, 3, 8, 8, generator=generator)
    return images.to(world.device), torch.randint(7, (MICRO_BATCH,), generator=generator).to(world.device)


def _engine_steps(
    network: nn.Module, config: EngineConfig, world: World, accumulation: int
) -> dict[str, dict[str, torch.Tensor]]:
    engine = Engine(
        network, optim=OPTIM, config=config, world=world, micro_batch=MICRO_BATCH, accumulation=accumulation
    )
    for step in range(NUM_STEPS):
        for micro in range(accumulation):
            engine.forward_backward(*_batch(step, micro, world), is_last=micro == accumulation - 1)
        engine.update(OPTIM.learning_rate)
    found = {"weights": engine.gather("weights"), "ema": engine.gather("ema")}
    engine.close()
    return found


def _plain_steps(
    start: dict[str, torch.Tensor], precision: str, world: World, accumulation: int
) -> dict[str, dict[str, torch.Tensor]]:
    """No fragments, no fused loops: whole gradients averaged over ranks, and the formulas of the paper."""
    model = _network().to(world.device)
    model.load_state_dict(start)
    groups = param_groups(model, lr=OPTIM.learning_rate, weight_decay=OPTIM.weight_decay)
    optimizer = torch.optim.SGD(groups, lr=OPTIM.learning_rate, momentum=OPTIM.momentum, nesterov=True)
    average = {n: t.clone() for n, t in start.items()}
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for micro in range(accumulation):
            images, labels = _batch(step, micro, world)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            loss = label_smoothing_cross_entropy(logits.float(), labels, OPTIM.label_smoothing)
            (loss / (accumulation * world.size)).backward()
        for parameter in model.parameters():
            if world.size > 1 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        nfnet.adaptive_clip_grad_(model.named_parameters(), OPTIM.clipping, OPTIM.clipping_eps)
        optimizer.step()
        keep = min(OPTIM.ema_decay or 0.0, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            average[name].mul_(keep).add_(parameter.detach(), alpha=1 - keep)
    return {"weights": {n: p.detach() for n, p in model.named_parameters()}, "ema": average}


def _distance(
    ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Largest difference of one parameter's change, as a share of its largest change; a weight's last bits are no change."""
    worst = 0.0
    for name, value in expected.items():
        change = max(float((value - start[name]).abs().max()), 1e-2 * float(value.abs().max()))
        share = float((ours[name] - value).abs().max()) / change
        worst = share if not share <= worst else worst  # NaN is worst
    return worst
