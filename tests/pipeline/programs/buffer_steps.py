"""Run by test_buffers.py: the steps of engine_steps.py with a network that has batch normalisation and a counter."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.engine.engine import Engine
from pipeline.models.batch_norm import set_statistics
from pipeline.supervision.process_exit import end
from tests.pipeline.programs import engine_steps


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(6, 10, 3), nn.BatchNorm2d(10, momentum=0.3), nn.ReLU())
        self.head = nn.Linear(10, 10)
        self.register_buffer("table", torch.linspace(0.1, 1, 10))
        self.register_buffer("scratch", torch.ones(10), persistent=False)
        self.recomputes = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.recomputes = enable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recomputes and self.training else self.block(x)
        return self.head(x.mean((2, 3)) * self.table * self.scratch)


def network(statistics: Any = "local") -> nn.Module:
    torch.manual_seed(0)
    return set_statistics(Small(), statistics)


def make(me: Any, options: dict[str, Any]) -> Engine:
    engine_steps.network = lambda: network(options.get("statistics", "local"))  # type: ignore[assignment, return-value]
    return made(me, options)


made = engine_steps.make
if __name__ == "__main__":
    engine_steps.make = make
    engine_steps.main()
    end(0)
