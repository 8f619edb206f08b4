"""A part of the blocks computed again in the backward pass: the same numbers from less memory."""

import itertools
from collections import Counter
from collections.abc import Iterable

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


def test_any_part_gives_the_bits_of_none_from_the_less_memory_the_more_it_is() -> None:
    torch.manual_seed(1)
    model = nfnet.create_model("nfnet_tiny", num_classes=10, stochastic_depth=0.5, drop_rate=0.2).train()
    found = []
    for share, every in ((0.0, 1), (0.01, 1), (1.0, 3), (1.0, 2), (1.0, 1)):
        model.set_grad_checkpointing(share > 0, share, every)
        found.append(trained(model))
    assert all(a > b for a, b in itertools.pairwise(kept for kept, _ in found))
    for _, numbers in found:
        assert all(torch.equal(a, b) for a, b in zip(numbers, found[0][1], strict=True))


def deep() -> nfnet.NFNet:
    """Blocks alike, so that no single one decides what is held at most."""
    with torch.device("meta"):
        return nfnet.NFNet(
            Variant(name="deep", depths=(3, 3), widths=(32, 64), strides=(1, 2), stem_widths=(16,), stem_strides=(2,),
                    group_width=16),
            10,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("share", "every", "blocks"),
    [(1 / 3, 1, [0, 1]), (0.333, 1, [0, 1]), (0.34, 1, [0, 1, 2]), (1.0, 1, range(6)), (0.01, 1, [0]), (0.01, 3, [0]),
     (1.0, 2, [0, 2, 4]), (1.0, 4, [0, 4]), (0.5, 2, [0, 2]), (1.0, 9, [0]), (0, 1, [])],
)  # fmt: skip
def test_these_blocks_and_no_others_are_computed_again(share: float, every: int, blocks: Iterable[int]) -> None:
    """A share is the next whole number of blocks."""
    model = deep().to_empty(device="cpu").train()
    passes: Counter[int] = Counter()
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: passes.update([number]))
    model.set_grad_checkpointing(share > 0, share, every)
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    assert passes == Counter([*range(6), *blocks])


def test_the_profile_of_a_step_lies_between_none_and_all() -> None:
    model = deep()
    none, second, half, whole = (
        step_profile(model, 64, checkpointing=share, every=every) for share, every in ((0, 1), (1, 2), (0.5, 1), (1, 1))
    )
    assert none.fullest(64)[0] > second.fullest(64)[0] > half.fullest(64)[0] > whole.fullest(64)[0]
    assert none.multiply_adds < second.multiply_adds < whole.multiply_adds
    for share, every in ((0.5, 1), (1.0, 2)):
        with pytest.raises(ValueError, match="a part of its blocks"):
            step_profile(Whole(), 8, checkpointing=share, every=every)


class Whole(nn.Module):
    """As networks of timm's: all blocks or none."""

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...
