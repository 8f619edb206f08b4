"""What every network has, ours and the trunks: a stem, blocks, an end, pooling and a head."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nfnet.functional import outside_autocast, pooled_mean

HEAD_STD = 0.01


class Network(nn.Module):
    """(N, in_chans, H, W) -> logits (N, num_classes), or pooled features (N, num_features) if num_classes is 0."""

    stem: nn.Module
    blocks: nn.ModuleList
    num_features: int
    num_classes: int
    checkpointed: range = range(0)
    """Numbers of the blocks that are computed again in the backward pass."""

    def add_head(self, drop_rate: float, head_init: str) -> None:
        """Dropout and classifier; needs `num_features` and `num_classes`. ValueError for an unknown `head_init`."""
        if head_init not in ("normal", "zero"):
            raise ValueError(f"head_init is {head_init!r}; choose normal ({HEAD_STD}) or zero")
        self.head_init = head_init
        self.dropout = nn.Dropout(drop_rate)
        self.head = self.new_head(self.num_classes)

    def new_head(self, num_classes: int, **where: Any) -> nn.Linear | nn.Identity:
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; give 1 or more, or 0 for a network without a head")
        if num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes, **where)
        self.reset_head(head)
        return head

    def reset_head(self, head: nn.Module) -> None:
        if not isinstance(head, nn.Linear) or head.weight.is_meta:
            return
        if self.head_init == "zero":
            nn.init.zeros_(head.weight)
        else:
            nn.init.normal_(head.weight, std=HEAD_STD)
        nn.init.zeros_(head.bias)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True, share: float = 1.0, every: int = 1) -> None:
        """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more work.

        Args:
            share: of the blocks, at least one: the first ones, whose maps are the largest.
            every: of these the first, and each that is so many blocks after one.
        """
        self.checkpointed = range(0, math.ceil(round(share * len(self.blocks), 6)) if enable else 0, every)

    def end(self, x: torch.Tensor) -> torch.Tensor:
        """After the last block, its activation included."""
        raise NotImplementedError

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w)."""
        x = self.stem(x)
        again = self.checkpointed if self.training and torch.is_grad_enabled() else range(0)
        for number, block in enumerate(self.blocks):
            if number in again:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.end(x)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """(N, num_features, h, w) -> (N, num_features), fp32 under autocast."""
        return pooled_mean(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, num_features, h, w) -> pooled features (N, num_features) if `pre_logits`, else logits.

        Both are fp32 under autocast.
        """
        features = self.pooled(x)
        return features if pre_logits else outside_autocast(self.head, self.dropout(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
