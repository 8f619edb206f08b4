"""Run by test_optimisers.py: networks of timm's under the engine and under a plain loop of torch's and timm's own parts.

argv: where the losses go; a name of FULL, or nothing for all of NETWORKS; with a name, the steps of stages 0 to 3 alone, without
the plain loop.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nfnet.optim.sgd import average_keep
from pipeline.distributed import World, join
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.models import timm_models
from pipeline.supervision.process_exit import end

CLASSES, PX = 10, 32
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ResNet, SGD": ("resnet10t", {}, {"name": "sgd", "clip": "none", "learning_rate": 2e-3, "weight_decay": 1e-4}),
    "ResNet, LAMB": (
        "resnet10t",
        {},
        {
            "name": "lamb",
            "clip": "none",
            "learning_rate": 5e-3,
            "weight_decay": 0.02,
            "epsilon": 1e-6,
            "loss": "binary",
        },
    ),
    "ViT, AdamW": (
        "vit_tiny_patch16_224",
        {"img_size": PX, "patch_size": 8, "depth": 3},
        {"name": "adamw", "clip": "norm", "learning_rate": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75},
    ),
    "ConvNeXt, AdamW": (
        "convnext_atto",
        {},
        {"name": "adamw", "clip": "norm", "clip_norm": 5.0, "learning_rate": 1e-3, "weight_decay": 0.05},
    ),
    "ConvNeXt, Lion": (
        "convnext_atto",
        {},
        {"name": "lion", "clip": "none", "learning_rate": 1e-4, "weight_decay": 0.1},
    ),
    "ConvNeXt, Muon": (
        "convnext_atto",
        {},
        {"name": "muon", "clip": "none", "learning_rate": 1e-3, "weight_decay": 0.1},
    ),
}


FULL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ResNet-50": (
        "resnet50",
        {},
        {
            "name": "sgd",
            "clip": "none",
            "learning_rate": 0.1 * 8 / 256,
            "weight_decay": 2e-5,
            "ema_decay": 0.9998,
        },
    ),
    "ViT-S": (
        "vit_small_patch16_224",
        {"img_size": 64, "stochastic_depth": 0.1},
        {
            "name": "adamw",
            "clip": "norm",
            "learning_rate": 5e-4 * (8 / 512) ** 0.5,
            "weight_decay": 0.05,
            "ema_decay": 0.99996,
        },
    ),
    "ConvNeXt-T": (
        "convnext_tiny",
        {"stochastic_depth": 0.1},
        {
            "name": "adamw",
            "clip": "none",
            "learning_rate": 4e-3 * (8 / 4096) ** 0.5,
            "weight_decay": 0.05,
            "ema_decay": 0.9999,
        },
    ),
}
"""Of full size, as timm's train.py (SGD), DeiT's and ConvNeXt's recipes train them; rates as timm's train.py scales them to a
batch of 8: by its share for SGD, by the root of it for AdamW."""


@dataclass(frozen=True)
class Length:
    steps: int
    warmup: int
    px: int
    num_batches: int
    """Different ones; then the first comes again, so that there is something to learn."""
    batch: int = 8


SHORT = Length(steps=20, warmup=4, px=PX, num_batches=20)
LONG = Length(steps=200, warmup=40, px=64, num_batches=10)


def network(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm_models.make(f"timm:{name}", CLASSES, options)


def batch(step: int, of: Length) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step % of.num_batches)
    images = torch.randn(of.batch, 3, of.px, of.px, generator=generator)
    return images, torch.randint(CLASSES, (of.batch,), generator=generator)


def ours(
    me: World, name: str, options: dict[str, Any], fields: dict[str, Any], stage: int, of: Length, num_steps: int
) -> list[float]:
    """Losses of the first steps; where weights are averaged, after the run's end also the average's on batch 0."""
    optim = OptimConfig(label_smoothing=0.1, **fields)
    engine = Engine(
        network(name, options),
        optim=optim,
        config=EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
        world=me,
        micro_batch=of.batch // me.size,
        accumulation=1,
    )
    losses = []
    for step in range(num_steps):
        images, labels = (t.chunk(me.size)[me.rank] for t in batch(step, of))
        torch.manual_seed(step)  # stochastic depth
        engine.forward_backward(images, labels, is_last=True)
        losses.append(engine.update(optim.rate(step, total_steps=of.steps, warmup_steps=of.warmup)).loss)
    if optim.ema_decay is not None:
        images, labels = batch(0, of)
        with engine.evaluation_network() as (averaged, weights), torch.no_grad():
            assert weights == "ema"
            losses.append(float(cross_entropy(averaged(images), labels)))
    engine.close()
    return losses


def plain(
    name: str, options: dict[str, Any], fields: dict[str, Any], of: Length, *, is_nudged: bool = False
) -> list[float]:
    """As timm's train.py puts them together: its factory of optimisers, losses, clipping, schedule by updates and average, with
    timm's network whole. The warm-up begins at 0 and comes before the cosine (`--warmup-lr 0 --warmup-prefix`).

    Args:
        is_nudged: one weight begins at the next number that fp32 has: how far rounding alone carries this network.
    """
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    model, _ = timm_models.as_timm(f"timm:{name}", network(name, options), options)
    model.train()
    if is_nudged:
        with torch.no_grad():
            first = next(model.parameters()).view(-1)[:1]
            first.copy_(torch.nextafter(first, first + 1))
    optim, rest = OptimConfig(**fields), {}
    if optim.name == "lamb":
        rest = {"max_grad_norm": None, "eps": optim.epsilon}
    if optim.name == "lion":
        rest = {"betas": (0.9, 0.999)}
    if optim.name == "muon":
        rest = {"betas": (0.9, 0.999)}
    optimiser = create_optimizer_v2(
        model,
        opt=optim.name,
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        momentum=0.9,
        layer_decay=optim.layer_decay if optim.layer_decay < 1 else None,
        **rest,
    )
    lengths: dict[str, Any] = {"t_initial": of.steps - of.warmup, "warmup_t": of.warmup, "warmup_prefix": True}
    schedule = CosineLRScheduler(optimiser, **lengths, t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.0) if optim.ema_decay is not None else None
    loss_of = BinaryCrossEntropy(smoothing=0.1) if optim.loss == "binary" else LabelSmoothingCrossEntropy(0.1)
    losses = []
    schedule.step_update(num_updates=0)
    for step in range(of.steps):
        images, labels = batch(step, of)
        torch.manual_seed(step)
        loss = loss_of(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        if optim.clip == "norm":
            dispatch_clip_grad(model.parameters(), value=optim.clip_norm, mode="norm")
        optimiser.step()
        if average is not None:
            average.decay = average_keep(optim.ema_decay, step)  # timm has other warm-ups of it than ours
            average.update(model)
        schedule.step_update(num_updates=step + 1)
        losses.append(float(loss.detach()))
    if average is not None:
        images, labels = batch(0, of)
        with torch.no_grad():
            losses.append(float(cross_entropy(average(images), labels)))
    return losses


def main() -> None:
    torch.set_num_threads(1)
    me = join()
    out, *which = sys.argv[1:]
    found: dict[str, dict[str, list[float]]] = {}
    of = LONG if which else SHORT
    for key, (name, options, fields) in ({which[0]: FULL[which[0]]} if which else NETWORKS).items():
        num_steps = int(which[1]) if len(which) > 1 else of.steps
        one = fields["name"] in ("lamb", "muon") or (which and len(which) == 1)
        stages = (0,) if one else (0, 1, 2, 3)
        found[key] = {f"stage {s}": ours(me, name, options, fields, s, of, num_steps) for s in stages}
        if len(which) < 2:
            found[key]["plain"] = plain(name, options, fields, of)
        if len(which) == 1 and name == "resnet50":
            found[key]["nudged"] = plain(name, options, fields, of, is_nudged=True)
        first = found[key].get("plain", found[key]["stage 0"])
        worst = {k: max(abs(a - b) for a, b in zip(v, first, strict=True)) for k, v in found[key].items()}
        print(key, worst, [round(loss, 4) for loss in first[:: max(1, len(first) // 8)]], first[-1], flush=True)
    if me.is_main:
        torch.save(found, out)


if __name__ == "__main__":
    main()
    end(0)
