"""Time several ways of doing the same work in turn, so that a machine that changes its speed changes all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def race(
    title: str,
    runs: Mapping[str, Callable[[], object]],
    *,
    ours: str | tuple[str, ...],
    target: float,
    limit: str | None = None,
    rounds: int = 7,
) -> float:
    """Print the medians of `rounds` alternating rounds and the paired ratio of the fastest peer to ours.

    Args:
        ours: the entry of `runs` that is ours, or several, of which the fastest counts; the others are peers, except `limit`.
        target: the ratio to reach.
        limit: the entry that nobody can be faster than (the matrix products alone, a bare copy).
    Returns:
        The median of the ratios, above 1 where ours is faster.
    """
    for work in runs.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            begin = time.perf_counter()
            work()
            _wait()
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(found) for name, found in times.items()}
    own = (ours,) if isinstance(ours, str) else ours
    best = min(own, key=medians.__getitem__)
    peer = min((name for name in runs if name not in (*own, limit)), key=medians.__getitem__)
    ratios = sorted(b / a for a, b in zip(times[best], times[peer], strict=True))
    ratio = statistics.median(ratios)
    print(f"{title}  [{hardware()}]")
    for name, seconds in medians.items():
        print(f"  {name:44s} {seconds * 1e3:9.1f} ms")
    verdict = "reached" if ratio >= target else f"missed by {(1 - ratio / target) * 100:.0f} %"
    of = "" if len(own) == 1 else f" of {best}"
    print(
        f"  ratio{of} to {peer}: {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}); target {target:.2f} {verdict}", end=""
    )
    if limit is not None:
        print(f"; nothing on these convolutions could reach more than {medians[peer] / medians[limit]:.2f}", end="")
    print(flush=True)
    return ratio


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hardware() -> str:
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} {os.cpu_count()} cores"
    )
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
