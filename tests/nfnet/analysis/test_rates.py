"""What a network computes and what a device can: the two sides of a share."""

import pytest
import torch
from torch import nn

from nfnet import create_model, functional
from nfnet.analysis.flops import training_flops
from nfnet.analysis.matrix_rate import matrix_rate


def test_a_training_pass_is_three_times_the_published_multiply_adds() -> None:
    """F0 at 192 px: 12.38 G "FLOPs" in the paper's table, which are multiply-adds at the test resolution of 256 px."""
    with torch.device("meta"):
        network = create_model("nfnet_f0", num_classes=1000)
    flops, why_not = training_flops(network, 256)
    assert flops / 6 == pytest.approx(12.38e9, rel=0.01) and why_not == ""


def test_a_network_that_looks_at_numbers_is_said_not_to_be_counted() -> None:
    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    flops, why_not = training_flops(Looks(), 8)
    assert flops == 0 and why_not.startswith("this network's arithmetic cannot be counted (")


def test_the_rate_is_one_that_a_product_reaches_and_takes_no_random_numbers() -> None:
    state = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < rate < 1e14


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_rate_in_bf16_is_of_the_type_in_which_the_networks_multiply(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied, product = set(), torch.mm

    def recorded(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        multiplied.add(a.dtype)
        return product(a, b, out=out)

    monkeypatch.setattr(functional, "multiplies_bf16", lambda: native)
    monkeypatch.setattr(torch, "mm", recorded)
    matrix_rate(torch.device("cpu"), bf16=True)
    assert multiplied == {dtype}
