"""What a device does in products of large matrices: the rate that a network's share is taken of."""

import time

import torch

from nfnet.functional import multiplied

LEAST_S = 0.05
_WIDTHS = {"cpu": 512, "cuda": 8192}


def matrix_rate(device: torch.device, *, bf16: bool = False) -> float:
    """Floating-point operations a second, two for each multiply-add: the best of several square products.

    It waits for the device. bf16 is multiplied as the networks' convolutions are, in fp32 where the processor would emulate it.
    On a CPU these are the threads of this process, with whatever else the machine does at that moment.
    """
    width = _WIDTHS.get(device.type, 1024)
    # No random numbers: a run's stream of them is not ours.
    (left,) = multiplied(
        torch.full((width, width), 0.5, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    )
    right, out = left.clone(), torch.empty_like(left)
    best_s, begin_s, num = float("inf"), time.perf_counter(), 0
    while num < 3 or time.perf_counter() - begin_s < LEAST_S:  # the first ones find kernels and fill caches
        at_s = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s, num = min(best_s, time.perf_counter() - at_s), num + 1
    return 2 * width**3 / best_s
