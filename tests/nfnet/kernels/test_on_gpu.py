"""Laws that only a real GPU can break; kernels against the reference on it are in test_programs.py."""

from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest
import torch

import nfnet
from nfnet.kernels import reference, triton_layers
from nfnet.kernels.reference import Rates
from nfnet.optim.agc import coefficients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
RATES = Rates(lr=0.1, momentum=0.9, weight_decay=1e-5, keep=0.999)


def clip_and_update(kernels: ModuleType, lists: Sequence[list[torch.Tensor]]) -> None:
    """As the engine does it, without its look at the sums between."""
    factors = coefficients(kernels.square_sums(lists[0]), kernels.square_sums(lists[1]), 0.01)
    kernels.update_(*lists, RATES, factors=factors)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any synchronisation of the host with the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def f0() -> tuple[list[torch.Tensor], ...]:
    shapes = [p.shape for p in nfnet.create_model("nfnet_f0").parameters()]
    made = [[torch.randn(s, device="cuda") * scale for s in shapes] for scale in (1.0, 0.02, 0.1, 1.0)]
    return tuple(made)


def test_the_host_never_waits(no_waiting: None) -> None:
    lists = f0()
    weight = torch.randn(64, 128, 3, 3, device="cuda")
    for _ in range(2):
        clip_and_update(triton_layers, lists)
        found = triton_layers.standardise(weight, weight[:, 0, 0, 0].contiguous(), out_dtype=torch.bfloat16)
        triton_layers.standardise_backward(found.out, weight, found.mean, *found[1:])
        triton_layers.scaled_activation_backward(
            triton_layers.scaled_activation(weight, "gelu", 1.7), weight, "gelu", 1.7
        )


def test_all_of_f0_is_updated_as_the_reference() -> None:
    ours = f0()
    copies = [[t.clone() for t in tensors] for tensors in ours]
    clip_and_update(triton_layers, ours)
    clip_and_update(reference, copies)
    for a, b in zip(ours, copies, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_updating_twice_is_the_same_bit_for_bit() -> None:
    results = []
    start = f0()
    for _ in range(2):
        lists = [[t.clone() for t in tensors] for tensors in start]
        clip_and_update(triton_layers, lists)
        results.append(lists)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
