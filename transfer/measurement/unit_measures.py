"""What a trained network's units do, and how its loss changes along its gradient.

    dead_share          by depth: channels that a convolution reads and that do not change over images and positions
    unit_correlation    by depth: mean absolute correlation of two of the others
    mutual_information  by depth: mean mutual information of two of the first `NUM_UNITS` of them, in nats, by histograms
    effective_beta      max over eta of |g(w - eta g) - g| / (eta |g|)     (Santurkar et al. 2018, section 3, measured at the end
    loss_range          max - min of the loss at these w - eta g           of training, on one batch)
    weights_size        norm of all parameters: with weights whose scale does not matter, beta falls as 1 / |w|^2

eta is the peak rate times 1/2, 1, 2 and 4: the source's own range was not seen. Dropout is off, the batch is the same for all.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

ETAS = (0.5, 1.0, 2.0, 4.0)
STILL = 1e-6
"""A channel whose values differ by less does not change."""
NUM_BINS, NUM_UNITS = 8, 64
NUM_POSITIONS = 4096
"""Images times positions that correlations are taken over, at most."""


@torch.no_grad()
def units(network: nn.Module, images: torch.Tensor) -> dict[str, float | list[float]]:
    """(N, 3, H, W) -> the three of what each convolution but the first reads, in evaluation mode: dropout is off."""
    dead: list[float] = []
    related: list[float] = []
    informed: list[float] = []
    first = True

    def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal first
        if first:
            first = False
            return
        rows = inputs[0].detach().float().transpose(0, 1).flatten(1)  # (channels, images and positions)
        still = rows.amax(1) - rows.amin(1) < STILL
        dead.append(still.float().mean().item())
        related.append(mean_correlation(rows[~still]))
        informed.append(mean_information(rows[~still][:NUM_UNITS]))

    hooks = [m.register_forward_pre_hook(look) for m in network.modules() if is_convolution(m)]
    was_training = network.training
    try:
        network.eval()(images)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return {"dead_share": dead, "unit_correlation": related, "mutual_information": informed} if dead else {}


def is_convolution(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 4


def mean_correlation(rows: torch.Tensor) -> float:
    """(units, observations) -> mean absolute correlation of two units; 0 for fewer than two."""
    count = len(rows)
    if count < 2:
        return 0.0
    rows = rows[:, :: max(1, rows.shape[1] // NUM_POSITIONS)]
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return ((rows @ rows.T).abs().sum().item() - count) / (count * (count - 1))


def mean_information(rows: torch.Tensor) -> float:
    """(units, observations) -> mean mutual information of two units in nats; 0 for fewer than two.

    H(x) + H(y) - H(x, y) of histograms with `NUM_BINS` bins of equal mass (ties share one), each entropy corrected by (occupied
    cells - 1) / (2 observations) (Miller 1955), for plain histograms find information where there is none. Binning loses some:
    two normal units of correlation .9 have .83 nats and show .70. Neighbouring positions are no independent observations.
    """
    units, rows = len(rows), rows[:, :: max(1, rows.shape[1] // NUM_POSITIONS)]
    if units < 2:
        return 0.0
    count = rows.shape[1]
    inner = torch.linspace(0, 1, NUM_BINS + 1, device=rows.device)[1:-1]
    edges = torch.quantile(rows, inner, dim=1).T.contiguous()
    cells = F.one_hot(
        torch.searchsorted(edges, rows.contiguous(), right=True), NUM_BINS
    ).float()  # (units, count, bins)
    flat = cells.transpose(1, 2).reshape(units * NUM_BINS, count)
    together = (flat @ flat.T).view(units, NUM_BINS, units, NUM_BINS).transpose(1, 2).flatten(2) / count
    joint, own = _entropy(together, count), _entropy(cells.mean(1), count)
    found = own[:, None] + own[None, :] - joint
    return (found.sum() - found.diagonal().sum()).item() / (units * (units - 1))


def _entropy(shares: torch.Tensor, count: int) -> torch.Tensor:
    """Of the last dimension, in nats, corrected for `count` observations."""
    return torch.special.entr(shares).sum(-1) + ((shares > 0).sum(-1) - 1) / (2 * count)


def smoothness(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, rate: float) -> dict[str, float]:
    """Along the gradient of one batch, in training mode; the network stays as it is."""
    moved = copy.deepcopy(network).train()
    for module in moved.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parameters = [p for p in moved.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    _, gradient = _loss_and_gradient(moved, parameters, images, labels)
    length = _norm(gradient)
    losses: list[float] = []
    betas: list[float] = []
    for eta in (rate * e for e in ETAS):
        with torch.no_grad():
            for p, begin, g in zip(parameters, start, gradient, strict=True):
                p.copy_(begin - eta * g)
        loss, other = _loss_and_gradient(moved, parameters, images, labels)
        losses.append(loss)
        betas.append(_norm([a - b for a, b in zip(other, gradient, strict=True)]) / max(eta * length, 1e-12))
    return {"effective_beta": max(betas), "loss_range": max(losses) - min(losses), "weights_size": _norm(start)}


def _loss_and_gradient(
    network: nn.Module, parameters: Sequence[nn.Parameter], images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    with torch.enable_grad():
        loss = F.cross_entropy(network(images).float(), labels)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())
