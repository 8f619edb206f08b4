"""What 100 linear heads cost next to one: the training alone, and the whole probe with its one pass over the images.

The heads alone are two matrix products a step; with 100 of them those are a hundred times as large, and next to them stands what
the bare products take, which nothing can beat. A probe is the pass of each image through the network once and ten epochs of
batches of 128 over its features (DINOv2's setting), so its cost is counted per image: one pass, and ten times a step / 128.
On a CPU one core's own seconds count, so that other work on the machine counts against nobody. Images are noise, not decoded.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import nfnet
from benchmarks.turns import hardware
from transfer.probes.linear import fit_linear

NUM_HEADS, BATCH, EPOCHS, LIMIT = 100, 128, 10, 1.5
STEPS = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _seconds(work: Callable[[], object]) -> float:
    clock = time.process_time if DEVICE == "cpu" else time.perf_counter
    _wait()
    begin = clock()
    work()
    _wait()
    return clock() - begin


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _step(width: int, num_classes: int, num_heads: int, rounds: int) -> float:
    """Median seconds of a step: a long training minus a short one, so that getting ready is in neither."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((width + 512, width), dtype=np.float32)
    labels = rng.integers(0, num_classes, len(features))

    def fit(num_steps: int) -> Callable[[], object]:
        grid = np.geomspace(1e-3, 1e-1, num_heads).tolist()
        return lambda: fit_linear(
            features, labels, num_classes, grid=grid, num_steps=num_steps, batch=BATCH, seed=0, device=DEVICE
        )

    fit(2)()
    num_steps = STEPS if num_heads > 1 else 10 * STEPS
    return statistics.median((_seconds(fit(num_steps)) - _seconds(fit(1))) / (num_steps - 1) for _ in range(rounds))


def _products(width: int, num_classes: int, rounds: int) -> float:
    """The two matrix products of 100 heads and nothing else."""
    images = torch.randn(BATCH, width + 1, device=DEVICE)
    weights = torch.randn(width + 1, NUM_HEADS * num_classes, device=DEVICE)
    logits, gradient = images @ weights, torch.empty_like(weights)

    def work() -> None:
        torch.mm(images, weights, out=logits)
        torch.mm(images.T, logits, out=gradient)

    work()
    return statistics.median(_seconds(work) for _ in range(3 * rounds))


@torch.inference_mode()
def _pass(name: str, px: int, rounds: int) -> tuple[float, int]:
    """(median seconds an image, width of its features)."""
    batch = 8 if DEVICE == "cpu" else 256
    model = nfnet.create_model(name).eval().to(DEVICE)
    images = torch.randn(batch, 3, px, px, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def work() -> torch.Tensor:
        return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]

    width = work().shape[1]
    return statistics.median(_seconds(work) for _ in range(rounds)) / batch, width


def main(rounds: int = 5) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        print(f"linear heads, batch {BATCH}  [{hardware()}]")
        for name, px, class_counts in (("nfnet_tiny", 64, (10,)), ("nfnet_f0", 192, (10, 100))):
            seconds, width = _pass(name, px, rounds)
            print(f"  {name} at {px} px: {seconds * 1e3:.2f} ms an image, features of {width}")
            for num_classes in class_counts:
                one, many = (_step(width, num_classes, h, rounds) for h in (1, NUM_HEADS))
                bare = _products(width, num_classes, rounds)
                ratio = (seconds + EPOCHS * many / BATCH) / (seconds + EPOCHS * one / BATCH)
                print(
                    f"    {num_classes} classes: a step of 1 head {one * 1e3:.2f} ms, of {NUM_HEADS} {many * 1e3:.2f} ms "
                    f"(the bare products {bare * 1e3:.2f} ms), {many / one:.1f}x"
                )
                verdict = "reached" if ratio <= LIMIT else "MISSED"
                print(f"    the whole probe with {NUM_HEADS} heads: {ratio:.3f}x one head; limit {LIMIT}: {verdict}")
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
