"""Forward + backward of NFNet-F0 at 128 px, fp32: ours against timm's dm_nfnet_f0, both channels-last."""

from __future__ import annotations

import timm
import torch

import nfnet
from benchmarks.turns import compare

BATCH, PX = 8, 128


def main() -> None:
    images = torch.randn(BATCH, 3, PX, PX).to(memory_format=torch.channels_last)
    ours = nfnet.create_model("nfnet_f0").train()
    theirs = timm.create_model("dm_nfnet_f0").to(memory_format=torch.channels_last).train()

    def step(model: torch.nn.Module) -> None:
        model.zero_grad()
        model(images).logsumexp(1).sum().backward()

    title = f"forward + backward, F0 at {PX} px, batch {BATCH}"
    compare(title, lambda: step(ours), lambda: step(theirs), peer_name="timm", rounds=5)
