"""Clip + update + average on NFNet-F0's parameters: ours against timm's AGC, torch's SGD and timm's EMA."""

from __future__ import annotations

import timm
import torch
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad

import nfnet
from benchmarks.turns import race
from nfnet.optim.param_groups import param_groups
from nfnet.optim.sgd import SGD


def _fill(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)


def main() -> None:
    ours = nfnet.create_model("nfnet_f0")
    optimizer = SGD(param_groups(ours, lr=0.1, weight_decay=2e-5), lr=0.1, ema_decay=0.99999, clipping=0.01)
    theirs = timm.create_model("dm_nfnet_f0")
    peer_optimizer = torch.optim.SGD(
        theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-5, fused=True
    )
    average = ModelEmaV3(theirs, decay=0.99999)
    _fill(ours), _fill(theirs)

    def peer_update() -> None:
        adaptive_clip_grad(theirs.parameters(), 0.01)
        peer_optimizer.step()
        average.update(theirs)

    runs = {"ours": optimizer.step, "timm's AGC and EMA, torch's fused SGD": peer_update}
    race("clip + update + EMA, F0, fp32", runs, ours="ours", target=2.0)
