"""A whole step of F0 through the engine: eager, its blocks compiled, the network compiled, and on a GPU recorded as CUDA graphs;
against timm's dm_nfnet_f0 in channels-last, eager and compiled, with timm's clipping and torch's SGD; and the bare convolutions.

python -m benchmarks step_compiled      NORMFREE_BENCH_STAGES=4, NORMFREE_BENCH_DEPTH=6: the first stages of F0, and at most so
                                        many blocks of each; NORMFREE_BENCH_PX=128; NORMFREE_BENCH_BATCH=8;
                                        NORMFREE_BENCH_PRECISION=fp32; NORMFREE_BENCH_ROUNDS=5

Minutes of compilation. What compiles is said with numbers of graphs and seconds, and what falls back to eager passes too.
"""

import dataclasses
import os
import time
from collections.abc import Callable

import timm
import torch
from timm.models.nfnet import NormFreeNet, _dm_nfnet_cfg
from timm.utils.agc import adaptive_clip_grad
from torch.nn import functional as F

import nfnet
from benchmarks.step import bare_convolutions
from benchmarks.turns import race
from nfnet.variants import Variant, get_variant
from pipeline.compilation.compile_engine import compiled
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.distributed import World, join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.records import Notice

CLASSES, TARGET, LIMIT = 1000, 1.25, "the convolutions alone"
F0 = (1, 2, 6, 3)


def main(*, target: float = TARGET, px: int = 128, batch: int = 8, precision: str = "fp32") -> None:
    px, batch = (int(os.environ.get(f"NORMFREE_BENCH_{k}", v)) for k, v in (("PX", px), ("BATCH", batch)))
    precision = os.environ.get("NORMFREE_BENCH_PRECISION", precision)
    rounds, depth = (int(os.environ.get(f"NORMFREE_BENCH_{k}", v)) for k, v in (("ROUNDS", 5), ("DEPTH", 6)))
    depths = tuple(min(n, depth) for n in F0[: int(os.environ.get("NORMFREE_BENCH_STAGES", "4"))])
    me = join()
    images = torch.randn(batch, 3, px, px, device=me.device).to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=me.device)
    # One engine after the other is compiled, and all take turns.
    modes = {"eager": {}, "blocks": {"compile": "blocks"}, "network": {"compile": "network"}}
    if me.device.type == "cuda":
        modes["network, CUDA graphs"] = {"compile": "network", "cuda_graphs": True}
    runs = {f"ours, {name}": _ours(me, depths, px, images, labels, precision, fields) for name, fields in modes.items()}
    ours = tuple(runs)
    runs["timm, channels-last"] = _timm(me, depths, images, labels, precision, is_compiled=False)
    runs["timm, channels-last, compiled"] = _timm(me, depths, images, labels, precision, is_compiled=True)
    network = nfnet.NFNet(_variant(depths), CLASSES).to(me.device)
    runs[LIMIT] = bare_convolutions(network, images, torch.bfloat16 if precision == "bf16" else torch.float32)
    title = f"a step, F0 with {depths} blocks at {px} px, batch {batch}, {precision}"
    race(title, runs, ours=ours, target=target, limit=LIMIT, rounds=rounds)
    leave()


def _variant(depths: tuple[int, ...]) -> Variant:
    whole, num = get_variant("nfnet_f0"), len(depths)
    widths = whole.widths[:num]
    return dataclasses.replace(
        whole, depths=depths, widths=widths, strides=whole.strides[:num], final_width=2 * widths[-1]
    )


def _ours(
    me: World,
    depths: tuple[int, ...],
    px: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: str,
    fields: dict[str, object],
) -> Callable[[], None]:
    config = EngineConfig(precision=precision, **fields)  # type: ignore[arg-type]
    optim = OptimConfig(learning_rate=0.01, weight_decay=2e-5, ema_decay=None)
    network = nfnet.NFNet(_variant(depths), CLASSES)
    engine = Engine(network, optim=optim, config=config, world=me, micro_batch=len(images), accumulation=1)
    passes = compiled(engine, config, AugmentConfig(image_px=px), CLASSES)
    while True:
        try:
            record = next(passes)
        except StopIteration as end:
            print(f"  ours, {config.compile}: {end.value}", flush=True)
            break
        if isinstance(record, Notice):
            print(f"  {record.text}", flush=True)

    def step() -> None:
        engine.forward_backward(images, labels, is_last=True)
        engine.update(0.01)

    return step


def _timm(
    me: World,
    depths: tuple[int, ...],
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: str,
    *,
    is_compiled: bool,
) -> Callable[[], None]:
    theirs = _dm_nfnet_cfg(depths=depths, channels=_variant(depths).widths)
    model = NormFreeNet(theirs, num_classes=CLASSES).train()
    model = model.to(me.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=2e-5)
    clipped = [p for n, p in model.named_parameters() if not n.startswith("head.fc")]
    network = torch.compile(model, dynamic=False) if is_compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        adaptive_clip_grad(clipped)
        optimizer.step()

    begin = time.perf_counter()
    step()
    if is_compiled:
        print(f"  timm {timm.__version__}, compiled: {time.perf_counter() - begin:.0f} s", flush=True)
    return step


if __name__ == "__main__":
    main()
