"""Networks with what ours have not: parameters that get no gradient, buffers of whole numbers and of truth values."""

from typing import Any

import torch
from torch import nn

from pipeline.distributed import World, join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig


class Odd(nn.Module):
    """A classifier with a token that its forward pass never uses, a counter, a mask and a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(8, 5))
        self.head = nn.Linear(12, 10)
        self.register_buffer("count", torch.zeros((), dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("table", torch.arange(3), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1
        return self.head(images.flatten(1) * self.mask.repeat(4))


def make(me: World, stage: Any) -> Engine:
    torch.manual_seed(0)
    optim = OptimConfig(learning_rate=0.1, weight_decay=0.1, momentum=0.0, ema_decay=0.9)
    config = EngineConfig(zero_stage=stage)
    return Engine(Odd(), optim=optim, config=config, world=me, micro_batch=4, accumulation=2)


def test_what_gets_no_gradient_decays_alike_at_every_stage_and_is_named() -> None:
    me = join()
    found: dict[int, dict[str, torch.Tensor]] = {}
    for stage in (0, 1, 2, 3):
        engine = make(me, stage)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for part in range(2):
                images = torch.randn(4, 3, 2, 2, generator=generator)
                engine.forward_backward(images, torch.tensor([0, 1, 2, 3]), is_last=part == 1)
            assert engine.update(0.1).applied
        assert engine.unused == ["token"]
        found[stage] = engine.gather("weights")
        kept = {k: v.tolist() for k, v in engine.whole_state().items() if "count" in k or "mask" in k or "table" in k}
        mask, count = [True, False, True], 6
        assert kept == {
            "weights/count@0": count,
            "weights/mask@0": mask,
            "ema/count@0": count,
            "ema/mask@0": mask,
        }
        engine.close()
    leave()
    decayed = torch.ones(8, 5) * (1 - 0.1 * 0.1) ** 3  # plain SGD with L2 decay, Goodfellow et al. 2016, eq. 7.5
    for state in found.values():
        torch.testing.assert_close(state["token"], decayed)
        torch.testing.assert_close(state["head.weight"], found[0]["head.weight"])
