"""A part of the blocks computed again in the backward pass: the same numbers from less memory."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import nfnet
from nfnet.analysis.activation_memory import saved_bytes
from nfnet.analysis.step_profile import step_profile
from nfnet.variants import Variant


def trained(model: nn.Module) -> tuple[int, list[torch.Tensor]]:
    """(bytes kept for the backward pass, loss and gradients)."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    with saved_bytes(model) as kept:
        loss = cross_entropy(model(images), labels)
    model.zero_grad()
    loss.backward()
    return kept.total, [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_any_share_gives_the_bits_of_none_from_the_less_memory_the_more_it_is() -> None:
    torch.manual_seed(1)
    model = nfnet.create_model("nfnet_tiny", num_classes=10, stochastic_depth=0.5, drop_rate=0.2).train()
    found = {}
    for share in (0.0, 0.01, 0.5, 1.0):
        model.set_grad_checkpointing(share > 0, share)
        found[share] = trained(model)
    assert all(a > b for a, b in itertools.pairwise(kept for kept, _ in found.values()))
    for _, numbers in found.values():
        assert all(torch.equal(a, b) for a, b in zip(numbers, found[0.0][1], strict=True))


def deep() -> nfnet.NFNet:
    """Blocks alike, so that no single one decides what is held at most."""
    with torch.device("meta"):
        return nfnet.NFNet(
            Variant(name="deep", depths=(3, 3), widths=(32, 64), strides=(1, 2), stem_widths=(16,), stem_strides=(2,),
                    group_width=16),
            10,
        )  # fmt: skip


@pytest.mark.parametrize(("share", "num"), [(1 / 3, 2), (0.333, 2), (0.34, 3), (1.0, 6), (0.01, 1)])
def test_a_share_is_the_next_whole_number_of_blocks(share: float, num: int) -> None:
    model = deep()
    model.set_grad_checkpointing(True, share)
    assert model.num_checkpointed == num
    model.set_grad_checkpointing(False)
    assert model.num_checkpointed == 0


def test_the_profile_of_a_step_lies_between_none_and_all() -> None:
    model = deep()
    none, half, every = (step_profile(model, 64, checkpointing=share) for share in (0.0, 0.5, 1.0))
    assert none.fullest(64)[0] > half.fullest(64)[0] > every.fullest(64)[0]
    assert none.multiply_adds < half.multiply_adds < every.multiply_adds
    with pytest.raises(ValueError, match="a part of its blocks"):
        step_profile(Whole(), 8, checkpointing=0.5)


class Whole(nn.Module):
    """As networks of timm's: all blocks or none."""

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...
