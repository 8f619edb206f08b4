"""Run by test_optimisers.py: networks of timm's under the engine and under a plain loop of torch's and timm's own parts."""

import sys
from typing import Any

import torch
from torch import nn

from pipeline.distributed import World, join
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.models import timm_models
from pipeline.supervision.process_exit import end

STEPS, BATCH, CLASSES, PX = 20, 8, 10, 32
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


def network(name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm_models.make(f"timm:{name}", CLASSES, options)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, PX, PX, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def ours(me: World, name: str, options: dict[str, Any], fields: dict[str, Any], stage: int) -> list[float]:
    optim = OptimConfig(label_smoothing=0.1, **fields)
    engine = Engine(
        network(name, options),
        optim=optim,
        config=EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
        world=me,
        micro_batch=BATCH,
        accumulation=1,
    )
    losses = []
    for step in range(STEPS):
        engine.forward_backward(*batch(step), is_last=True)
        losses.append(engine.update(optim.rate(step, total_steps=STEPS, warmup_steps=4)).loss)
    engine.close()
    return losses


def plain(name: str, options: dict[str, Any], fields: dict[str, Any]) -> list[float]:
    """As timm's train.py puts them together: its factory of optimisers, losses and clipping, with timm's network whole."""
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import dispatch_clip_grad

    model, _ = timm_models.as_timm(f"timm:{name}", network(name, options), options)
    model.train()
    optim, rest = OptimConfig(**fields), {}
    if optim.name == "lamb":
        rest = {"max_grad_norm": None, "eps": optim.epsilon}
    if optim.name == "lion":
        rest = {"betas": (0.9, 0.999)}
    if optim.name == "muon":
        rest = {"betas": (0.9, 0.999)}
    optimiser = create_optimizer_v2(
        model,
        opt={"sgd": "sgd"}.get(optim.name, optim.name),
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        momentum=0.9,
        layer_decay=optim.layer_decay if optim.layer_decay < 1 else None,
        **rest,
    )
    loss_of = BinaryCrossEntropy(smoothing=0.1) if optim.loss == "binary" else LabelSmoothingCrossEntropy(0.1)
    losses = []
    for step in range(STEPS):
        images, labels = batch(step)
        for group in optimiser.param_groups:
            group["lr"] = optim.rate(step, total_steps=STEPS, warmup_steps=4) * group.get("lr_scale", 1.0)
        loss = loss_of(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        if optim.clip == "norm":
            dispatch_clip_grad(model.parameters(), value=optim.clip_norm, mode="norm")
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    torch.set_num_threads(1)
    me = join()
    found: dict[str, dict[str, list[float]]] = {}
    for key, (name, options, fields) in NETWORKS.items():
        stages = (0,) if fields["name"] in ("lamb", "muon") else (0, 1, 2, 3)
        found[key] = {f"stage {s}": ours(me, name, options, fields, s) for s in stages}
        found[key]["plain"] = plain(name, options, fields)
        worst = {k: max(abs(a - b) for a, b in zip(v, found[key]["plain"], strict=True)) for k, v in found[key].items()}
        print(key, worst, found[key]["plain"][0], found[key]["plain"][-1], flush=True)
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
    end(0)
