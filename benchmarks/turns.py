"""Time two ways of doing the same work in turn, so that a machine that changes its speed changes both."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable

import torch


def compare(title: str, ours: Callable[[], None], peer: Callable[[], None], *, peer_name: str, rounds: int = 7) -> None:
    """Print the medians of `rounds` alternating runs and the median of the paired ratios (above 1: ours is faster)."""
    ours(), peer()
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        pair = []
        for work in (ours, peer):
            begin = time.perf_counter()
            work()
            pair.append(time.perf_counter() - begin)
        times.append((pair[0], pair[1]))
    a, b = (statistics.median(t[i] for t in times) * 1e3 for i in (0, 1))
    ratios = sorted(t[1] / t[0] for t in times)
    print(
        f"{title}: ours {a:.1f} ms, {peer_name} {b:.1f} ms, ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f}-{ratios[-1]:.2f})  [{hardware()}]"
    )


def hardware() -> str:
    return f"{platform.machine()} {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
