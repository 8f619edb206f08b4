"""On a GPU, ours against timm in turn: python -m benchmarks.gpu [f0 f4 update compiled].

f0: forward + backward of F0 at 192 px, fp32 and bf16, eager and compiled, and the bare convolutions as the limit. f4: F4+ at
224 and 384 px with and without activation checkpointing, as a share of the matrix rate that this card reaches in the same
run. update: `Engine.update` on F0's parameters. compiled: whole steps of F0 through the engine, eager, compiled and recorded
as CUDA graphs. Without a GPU: one sentence.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable

import torch

import nfnet
from benchmarks import step_compiled, update
from benchmarks.step import bare_convolutions
from benchmarks.turns import race
from nfnet.analysis.flops import multiply_adds

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
        ours = nfnet.create_model("nfnet_f0").cuda().train()
        theirs = timm.create_model("dm_nfnet_f0").cuda().to(memory_format=torch.channels_last).train()
        images = torch.randn(BATCH, 3, PX, PX, device="cuda").to(memory_format=torch.channels_last)
        limit = "the convolutions alone"
        for compiled in (False, True):
            torch._dynamo.reset()
            wrap = torch.compile if compiled else (lambda model: model)
            runs = {
                "ours": stepper(wrap(ours), BATCH, PX, dtype),
                "timm": stepper(wrap(theirs), BATCH, PX, dtype),
                limit: bare_convolutions(ours, images, dtype),
            }
            title = f"forward + backward, F0 at {PX} px, batch {BATCH}, {label}, {'compiled' if compiled else 'eager'}"
            race(title, runs, ours="ours", target=1.5, limit=limit)
            del runs[limit]  # with the images that it keeps
            peaks = ", ".join(f"{name} {peak_memory(step):.2f} GiB" for name, step in runs.items())
            print(f"  peak memory: {peaks} (both models and gradients included)")


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
        work = 3 * multiply_adds(model, px)  # forward, and twice that backward; what is computed again is no work
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


def compiled() -> None:
    step_compiled.main(target=1.5, px=PX, batch=BATCH, precision="bf16")


PARTS: dict[str, Callable[[], None]] = {
    "f0": f0,
    "f4": f4,
    "update": lambda: update.main(target=5.0),
    "compiled": compiled,
}


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
