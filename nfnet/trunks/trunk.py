"""What every trunk has: a method, features, a head; the same names as the networks of `nfnet.model`."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nfnet.functional import is_autocast, linear_fp32
from nfnet.normalizers.method import Method

HEAD_STD = 0.01


class Trunk(nn.Module):
    """(N, in_chans, H, W) -> logits (N, num_classes), or pooled features (N, num_features) if num_classes is 0."""

    stem: nn.Module
    blocks: nn.ModuleList
    final: nn.Module
    """After the last block, its activation included."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        method: Method,
        *,
        in_chans: int,
        px: int,
        drop_rate: float,
        head_init: str,
    ) -> None:
        super().__init__()
        if head_init not in ("normal", "zero"):
            raise ValueError(f"head_init is {head_init!r}; choose normal (0.01) or zero")
        self.num_features, self.num_classes, self.method, self.in_chans, self.px = (
            num_features,
            num_classes,
            method,
            in_chans,
            px,
        )
        self.grad_checkpointing = False
        self.before_head = method.before_head(num_features)
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear) and not self.head.weight.is_meta:
            nn.init.normal_(self.head.weight, std=HEAD_STD if head_init == "normal" else 0.0)
            nn.init.zeros_(self.head.bias)

    @property
    def branches(self) -> list[Sequence[nn.Module]]:
        """The convolutions of each residual branch, in order; [] in a chain of layers."""
        return []

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass. Running averages then move twice a step, so it is refused with
        those."""
        if enable and not self.method.batch_free:
            raise ValueError(f"{self.method.name} takes statistics in the forward pass, which checkpointing repeats")
        self.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, num_features, h, w)."""
        x = self.stem(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        out: torch.Tensor = self.final(x)
        return out

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, num_features, h, w) -> pooled features (N, num_features) if `pre_logits`, else logits; fp32 under autocast."""
        pooled = x.mean(dim=(2, 3), dtype=torch.float32) if is_autocast(x) else x.mean(dim=(2, 3))
        pooled = self.before_head(pooled)
        return pooled if pre_logits else linear_fp32(self.head, self.dropout(pooled))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
