"""Sharpness-aware minimisation (`nfnet.optim.sam`) through DeepSpeed, which averages the second gradient only."""

from typing import Any

import torch
from torch import nn

from nfnet.optim.losses import MixedLabels, TaughtLabels
from nfnet.optim.sam import sam_backward
from pipeline.engine.buffers import Buffers
from pipeline.engine.deepspeed_engine import Objective
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.zero_layout import FragmentLayout
from pipeline.profiling.ranges import span


def sam_losses(
    network: nn.Module,
    objective: Objective,
    engine: Any,
    layout: FragmentLayout,
    buffers: Buffers,
    images: torch.Tensor,
    labels: torch.Tensor | MixedLabels | TaughtLabels,
    optim: OptimConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both passes of a micro-batch: the ascent, and DeepSpeed's forward and backward pass at the perturbed weights.

    Running statistics are those of the second pass, which reads the whole micro-batch.

    Returns the loss at the perturbed weights and the number of hits, both scalars.
    """
    passes, before = iter((objective, engine)), buffers.copy()
    seen: list[torch.Tensor] = []

    def loss_of(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        chosen = type(labels)(*(t[rows] for t in labels)) if isinstance(labels, tuple) else labels[rows]
        buffers.put(before)
        with span("forward"):
            loss, correct = next(passes)(images, chosen)
        seen[:] = [loss, correct]
        return loss

    def backward(loss: torch.Tensor) -> None:
        with span("backward"), buffers.unchanged():  # blocks may be computed again
            engine.backward(loss)

    with layout.whole(network) as restored:
        report = sam_backward(
            network,
            loss_of,
            images,
            torch.arange(len(images), device=images.device),
            rho=optim.sam_rho,
            share=optim.sam_share,
            backward=backward,
            restore=not restored,
        )
    # An ascent that is not finite moved nothing; through the loss all ranks learn of it, and skip the step.
    return seen[0].detach() + 0 * report.ascent_norm, seen[1]
