"""On a GPU, ours against timm in turn: python -m benchmarks.gpu [f0 f4 update convolutions].

f0: forward + backward of F0 at 192 px, fp32 and bf16, eager and compiled. f4: F4+ at 224 and 384 px with and without
activation checkpointing, as a share of the matrix rate that this card reaches in the same run. update: clip + update + EMA
on F0's parameters. convolutions: F0's bare convolutions, the limit of f0. Without a GPU: one sentence.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

import nfnet
from benchmarks.turns import race
from nfnet.layers import WSConv2d

BATCH, PX = 128, 192
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def seconds(work: Callable[[], object], rounds: int = 7) -> float:
    """Median of `rounds` after two to warm up, each waited for."""
    times = []
    for i in range(rounds + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if i > 1:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def stepper(model: torch.nn.Module, batch: int, px: int, dtype: torch.dtype) -> Callable[[], None]:
    """Forward + backward of channels-last images, under autocast for half precision; parameters are fp32."""
    images = torch.randn(batch, 3, px, px, device="cuda").to(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cuda", dtype) if dtype != torch.float32 else contextlib.nullcontext():
            loss = model(images).logsumexp(1).sum()
        loss.backward()

    return step


def f0() -> None:
    import timm

    for label, dtype in TYPES.items():
        for compiled in (False, True):
            torch._dynamo.reset()
            ours: torch.nn.Module = nfnet.create_model("nfnet_f0").cuda().train()
            theirs = timm.create_model("dm_nfnet_f0").cuda().to(memory_format=torch.channels_last).train()
            steps = [
                stepper(torch.compile(m) if compiled else m, BATCH, PX, dtype)  # type: ignore[arg-type]
                for m in (ours, theirs)
            ]
            title = f"forward + backward, F0 at {PX} px, batch {BATCH}, {label}, {'compiled' if compiled else 'eager'}"
            race(title, {"ours": steps[0], "timm": steps[1]}, ours="ours", target=1.5)
            peaks = [f"{peak_memory(step):.2f}" for step in steps]
            print(f"  peak memory: ours {peaks[0]} GiB, timm {peaks[1]} GiB (both models and gradients included)")


def peak_memory(step: Callable[[], None]) -> float:
    """GiB that torch's allocator held at most in one step, which must not be the first: that compiles and tries algorithms."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def matrix_rate(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Multiply-adds a second of one large product: what the card reaches, and not what its sheet says."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return size**3 / seconds(lambda: a @ b)


def f4() -> None:
    rate = matrix_rate()
    print(f"bf16 matrix product of 8192: {2 * rate / 1e12:.0f} TFLOP/s")
    model = nfnet.create_model("nfnet_f4+").cuda().train()
    for px, most in ((224, 128), (384, 64)):
        work = 3 * nfnet.multiply_adds(model, px)  # forward, and twice that backward; what is computed again is no work
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            batch, taken, memory = fitting(model, px, most)
            if not batch:
                print(f"F4+ at {px} px, bf16: not even one image fits in this card's memory")
                continue
            print(
                f"F4+ at {px} px, batch {batch}, bf16, checkpointing {'on' if checkpointing else 'off'}: "
                f"{batch / taken:.1f} images/s, {taken * 1e3:.0f} ms, {memory:.1f} GiB, "
                f"{work * batch / taken / rate:.1%} of the matrix rate"
            )


def fitting(model: torch.nn.Module, px: int, most: int) -> tuple[int, float, float]:
    """(batch, seconds, GiB) of the largest batch, halved from `most`, that fits; zeros where none does."""
    batch = most
    while batch:
        try:
            step = stepper(model, batch, px, torch.bfloat16)
            return batch, seconds(step, 5), peak_memory(step)
        except torch.OutOfMemoryError:
            model.zero_grad()
        # Outside of the handler: inside, the exception still holds the failed step's activations.
        torch.cuda.empty_cache()
        batch //= 2
    return 0, 0.0, 0.0


def update() -> None:
    import timm
    from timm.utils import ModelEmaV3
    from timm.utils.agc import adaptive_clip_grad

    from nfnet.groups import param_groups
    from nfnet.optim import SGD

    ours, theirs = nfnet.create_model("nfnet_f0").cuda(), timm.create_model("dm_nfnet_f0").cuda()
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
    our_optimizer = SGD(param_groups(ours, lr=0.1, weight_decay=2e-5), lr=0.1, ema_decay=0.99999, clipping=0.01)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-5, fused=True)
    average = ModelEmaV3(theirs, decay=0.99999)

    def peer_update() -> None:
        adaptive_clip_grad(theirs.parameters(), 0.01)
        optimizer.step()
        average.update(theirs)

    runs = {"ours": our_optimizer.step, "timm's AGC and EMA, torch's fused SGD": peer_update}
    race("clip + update + EMA, F0", runs, ours="ours", target=5.0)
    moved = sum(p.numel() for p in ours.parameters()) * 4 * 9  # norms read 2 values; the update reads 4 and writes 3
    print(f"  ours moves {moved / seconds(our_optimizer.step) / 1e12:.2f} TB/s")


class Convolution(NamedTuple):
    batch: int
    channels: int
    height: int
    width: int
    weight: tuple[int, ...]
    stride: int
    padding: tuple[int, int]
    groups: int


def recorded(name: str, batch: int, px: int) -> Counter[Convolution]:
    """What a network's convolutions are given in one forward pass, from the meta device; images padded already."""
    found: Counter[Convolution] = Counter()
    original = F.conv2d

    def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore[no-untyped-def]
        found[Convolution(*x.shape, tuple(weight.shape), stride, tuple(padding), groups)] += 1
        return original(x, weight, bias, stride, padding, dilation, groups)

    with torch.device("meta"):
        model = nfnet.create_model(name)
        F.conv2d = conv2d
        try:
            model(torch.empty(batch, 3, px, px))
        finally:
            F.conv2d = original
    if sum(found.values()) != sum(isinstance(m, WSConv2d) for m in model.modules()):
        raise RuntimeError("not every convolution was seen: nfnet.layers no longer calls F.conv2d")
    return found


def convolutions() -> None:
    for label, dtype in TYPES.items():
        total = 0.0
        for conv, times in recorded("nfnet_f0", BATCH, PX).items():
            x = torch.randn(conv[:4], device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.randn(conv.weight, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            bias = torch.zeros(conv.weight[0], device="cuda", dtype=dtype)
            # The network's first convolution has no gradient of its input to compute, nor has this.
            leaves = [t.requires_grad_() for t in ((weight, bias) if conv.channels == 3 else (x, weight, bias))]
            out = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
            grad = torch.randn_like(out)

            def both(x=x, weight=weight, bias=bias, conv=conv, grad=grad, leaves=leaves) -> None:  # type: ignore[no-untyped-def]
                y = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
                torch.autograd.grad(y, leaves, grad)

            total += times * seconds(both, 5)
        print(f"F0's convolutions alone at {PX} px, batch {BATCH}, {label}, forward + backward: {total * 1e3:.1f} ms")


PARTS = {"f0": f0, "f4": f4, "update": update, "convolutions": convolutions}


def main(names: list[str] | None = None) -> None:
    if not torch.cuda.is_available():
        print("gpu: there is no GPU here, so nothing is measured")
        return
    unknown = set(names or ()) - set(PARTS)
    if unknown:
        raise SystemExit(f"no part {sorted(unknown)[0]!r}; choose from {', '.join(PARTS)}")
    torch.backends.cudnn.benchmark = True
    tf32 = torch.backends.cudnn.allow_tf32
    print(f"gpu: {torch.cuda.get_device_name()}, torch {torch.__version__}, fp32 convolutions in TF32: {tf32}")
    for name in names or PARTS:
        PARTS[name]()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
