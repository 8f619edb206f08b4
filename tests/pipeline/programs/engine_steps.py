"""Run by test_engine.py in one or several processes: steps of the engine on fixed batches; rank 0 writes the outcome."""

import json
import sys

import torch

import nfnet
from pipeline.engine import Engine, EngineConfig
from pipeline.update import OptimConfig
from pipeline.world import join, leave

GLOBAL_BATCH, STEPS = 16, 10


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    return images, torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator)


def network() -> nfnet.NFNet:
    torch.manual_seed(0)
    return nfnet.create_model("nfnet_tiny", num_classes=10)


def main() -> None:
    out, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    me = join()
    engine = Engine(
        network(),
        optim=OptimConfig(learning_rate=0.1, weight_decay=1e-3, ema_decay=0.9, clipping=options.get("clipping", 0.01)),
        config=EngineConfig(zero_stage=options["stage"], precision=options.get("precision", "fp32")),
        world=me,
        micro_batch=GLOBAL_BATCH // me.size // options["accumulation"],
        accumulation=options["accumulation"],
    )
    stats = []
    for step in range(STEPS):
        images, labels = batch(step)
        if step == options.get("poison_step") and me.rank == me.size - 1:
            images[-1] = float("nan")  # lies in the last rank's last micro-batch
        share = GLOBAL_BATCH // options["accumulation"]
        for i, (x, y) in enumerate(zip(images.split(share), labels.split(share), strict=True)):
            n = len(x) // me.size
            mine = slice(me.rank * n, (me.rank + 1) * n)
            engine.forward_backward(x[mine], y[mine], is_last=i == options["accumulation"] - 1)
        stats.append(engine.update(0.1))
    state = {f"{k}/{n}": t for k in ("weights", "momentum", "ema") for n, t in engine.gather(k).items()}
    held = sum(t.numel() for t in engine.local_fragments().values())
    if me.is_main:
        torch.save({"state": state, "stats": [vars(s) for s in stats], "held": held}, out)
    leave()


if __name__ == "__main__":
    main()
