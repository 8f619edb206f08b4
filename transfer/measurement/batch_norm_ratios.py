"""What a training step costs beside the same trunk with torch's native batch normalisation, both on this machine, turn by turn.

speed_ratio        images a second over those of batch normalisation, forward and backward pass, the optimiser not included:
                   of the medians over `NUM_TURNS` steps of each
step_bytes         that autograd keeps between the two passes (`nfnet.analysis.activation_memory`)
memory_ratio       over those of batch normalisation
"""

import copy
import time
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nfnet.analysis.activation_memory import saved_bytes
from pipeline.models import trunks

NUM_TURNS = 5


def batch_norm_ratios(
    network: Any, name: str, options: dict[str, Any], images: torch.Tensor, labels: torch.Tensor
) -> dict[str, float]:
    """Of a trunk (else {}), on one batch (N, 3, H, W) with labels; the network stays as it is."""
    if not trunks.is_trunk(name):
        return {}
    of_trunk = {k: v for k, v in options.items() if k in trunks.OPTION_TYPES}
    with torch.random.fork_rng(devices=[]):
        reference = trunks.make(name, int(network.num_classes), {**of_trunk, "method": "batch_norm"})
    both = [copy.deepcopy(network).train(), reference.to(images.device).train()]
    kept = [_kept(net, images) for net in both]
    seconds: list[list[float]] = [[], []]
    for turn in range(NUM_TURNS + 1):
        for net, found in zip(both, seconds, strict=True):
            taken_s = _step(net, images, labels)
            if turn:  # the first one warms up
                found.append(taken_s)
    own_s, reference_s = map(median, seconds)
    return {
        "speed_ratio": reference_s / own_s,
        "step_bytes": float(kept[0]),
        "memory_ratio": kept[0] / max(1, kept[1]),
    }


def _kept(network: nn.Module, images: torch.Tensor) -> int:
    with torch.enable_grad(), saved_bytes(network) as counter:
        network(images)
    return counter.total


def _step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    network.zero_grad()
    _wait(images)
    begin = time.perf_counter()
    with torch.enable_grad():
        F.cross_entropy(network(images).float(), labels).backward()
    _wait(images)
    return time.perf_counter() - begin


def _wait(images: torch.Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
