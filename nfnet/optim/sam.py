"""Sharpness-aware minimisation (Foret et al. 2021; Brock et al. 2021b, A.4 and A.5) for one micro-batch at a time.

    e = rho * g / |g|        g: gradient at w of a share of the micro-batch; one norm over all parameters
    w.grad += scale * gradient of the whole micro-batch at w + e

Called for each micro-batch of a step, this is m-sharpness: every micro-batch perturbs with its own gradient, which is
never summed over ranks, and only second gradients accumulate. Clipping belongs to the accumulated second gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""images (N, ...), labels (N, ...) -> mean loss, a scalar that can be differentiated."""


class SamReport(NamedTuple):
    """Zero-dimensional tensors on the device; reading them is the caller's host synchronisation."""

    loss: torch.Tensor
    """Of the whole micro-batch at the perturbed weights."""
    ascent_loss: torch.Tensor
    """Of the share at the weights themselves."""
    ascent_norm: torch.Tensor
    """|g|. Not finite, or 0: nothing was perturbed, and the plain gradient was added."""


def sam_backward(
    model: nn.Module,
    objective: Objective,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    rho: float = 0.05,
    share: float = 1.0,
    scale: float = 1.0,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
    restore: bool = True,
) -> SamReport:
    """Add one micro-batch's SAM gradient to `.grad`; the weights are afterwards what they were, bit for bit (`restore`).

    Both passes start from the same random state, so with `share` 1 they drop the same units and branches, and the
    state after the call is the one that a plain backward pass leaves. Costs no host synchronisation.

    Args:
        model: whose parameters are perturbed; frozen ones are not. Running statistics would see both passes: the caller sees
            to those.
        objective: the loss of `model`; it may run under autocast.
        images: (N, ...), with labels (N, ...).
        rho: radius; 0 is the plain gradient, bit for bit. The papers: 0.05.
        share: of the micro-batch, its first images, that the ascent reads; at least one. The paper: 0.2.
        scale: of the gradient that is added: 1 / m under accumulation of m micro-batches.
        backward: called once, on the scaled loss at the perturbed weights; an engine's own backward goes here.
        restore: put the weights back; False leaves them perturbed and keeps no copy, for weights that are copies themselves.
    Raises:
        ValueError: rho below 0, a share outside (0, 1], no images, or a loss that depends on no trainable parameter.
    """
    if not rho >= 0:
        raise ValueError(f"rho is {rho}; set SAM's radius to 0 or more (0.05 in the papers)")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; set the ascent's share of the micro-batch above 0 and at most 1")
    if len(images) == 0:
        raise ValueError("the micro-batch has no images; SAM needs at least one")
    if rho == 0:
        loss = objective(images, labels)
        backward(loss if scale == 1 else loss * scale)
        return SamReport(loss.detach(), loss.detach(), torch.zeros_like(loss.detach()))
    weights = [p for p in model.parameters() if p.requires_grad]
    size = max(1, round(share * len(images)))
    with _same_randomness(images.device):
        ascent_loss = objective(images[:size], labels[:size])
        # Not backward(): .grad, and the hooks by which engines average gradients over ranks, see the second gradient only.
        gradients = torch.autograd.grad(ascent_loss, weights, allow_unused=True)
    reached = [(w, g) for w, g in zip(weights, gradients, strict=True) if g is not None]
    if not reached:
        raise ValueError("the loss depends on no trainable parameter; unfreeze one, or correct the objective")
    del gradients
    with _perturbed([w for w, _ in reached], [g for _, g in reached], rho, restore) as norm:
        del reached
        loss = objective(images, labels)
        backward(loss if scale == 1 else loss * scale)
    return SamReport(loss.detach(), ascent_loss.detach(), norm)


@contextmanager
@torch.no_grad()
def _perturbed(
    weights: list[torch.Tensor], gradients: list[torch.Tensor], rho: float, restore: bool
) -> Iterator[torch.Tensor]:
    """Weights moved by rho along their gradients inside, restored from a copy on the way out; yields the norm.

    In place, so that views (a flat buffer's) and recorded graphs stay valid; from a copy, since (w + e) - e is not w.
    """
    norms = torch._foreach_norm([g if g.dtype == torch.float64 else g.float() for g in gradients], 2)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = torch.where(torch.isfinite(norm) & (norm > 0), rho / norm, torch.zeros_like(norm))
    # 0 * nan is nan: without this a gradient that is not finite would reach the weights in spite of its factor 0.
    steps = [g.nan_to_num(0.0, 0.0, 0.0) for g in gradients]
    del gradients  # whole, and of no use to the second pass
    torch._foreach_mul_(steps, factor)
    kept = [w.detach().clone() for w in weights] if restore else []
    try:
        torch._foreach_add_(weights, steps)
        del steps
        with torch.enable_grad():
            yield norm
    finally:
        if restore:
            torch._foreach_copy_(weights, kept)


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    """What follows the block draws the same random numbers as the block did."""
    if device.type in ("cpu", "meta"):
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        index = device.index if device.index is not None else torch.get_device_module(device).current_device()
        with torch.random.fork_rng(devices=[index], device_type=device.type):
            yield
