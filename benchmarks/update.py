"""What an update of a run costs: `Engine.update` (sums, agreement, clip, SGD, EMA) on a network's parameters, against timm's
AGC, torch's fused SGD and timm's EMA.

    python -m benchmarks update
"""

from collections.abc import Callable

import timm
import torch
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad

import nfnet
from benchmarks.turns import race
from pipeline.distributed import join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [1e-3 * torch.randn(p.shape, generator=generator).to(p.device) for p in model.parameters()]


def of_engine(name: str) -> tuple[Callable[[], object], Engine]:
    """The update that a training loop calls, on gradients that are given anew each time (the engine takes them away)."""
    optim = OptimConfig(learning_rate=0.1, weight_decay=2e-5, ema_decay=0.99999, clipping=0.01)
    engine = Engine(
        nfnet.create_model(name), optim=optim, config=EngineConfig(), world=join(), micro_batch=1, accumulation=1
    )
    given = gradients(engine.network)
    engine._engine.set_gradient_accumulation_boundary(True)

    def update() -> None:
        for parameter, gradient in zip(engine.network.parameters(), given, strict=True):
            parameter.grad = gradient
        engine._seen.fill_(1.0)  # a loss and a sample, as a forward pass leaves them
        assert engine.update(0.1).applied

    return update, engine


def of_peers(name: str, device: torch.device) -> Callable[[], object]:
    model = timm.create_model(name).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-5, fused=True)
    average = ModelEmaV3(model, decay=0.99999)
    given = gradients(model)

    def update() -> None:
        for parameter, gradient in zip(model.parameters(), given, strict=True):
            parameter.grad = gradient
        adaptive_clip_grad(model.parameters(), 0.01)
        optimizer.step()
        average.update(model)

    return update


def main(target: float = 2.5) -> None:
    ours, engine = of_engine("nfnet_f0")
    runs = {
        "ours, Engine.update": ours,
        "timm's AGC and EMA, torch's fused SGD": of_peers("dm_nfnet_f0", engine.world.device),
    }
    race("clip + update + EMA, F0, fp32", runs, ours="ours, Engine.update", target=target)
    engine.close()
    leave()


if __name__ == "__main__":
    main()
