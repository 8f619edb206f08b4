"""Laws of the layers, against numbers that can be had without them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nfnet.functional import padded
from nfnet.layers import GAMMA, ScaledActivation, StochasticDepth, WSConv2d, avg_pool_same
from nfnet.model import NFNet
from nfnet.variants import Variant


@pytest.mark.parametrize("name", sorted(GAMMA))
def test_a_scaled_activation_gives_unit_variance_for_unit_variance(name: str) -> None:
    # Gauss-Hermite-like quadrature on a fine grid; the published constants are Monte-Carlo estimates, good to 0.1 %.
    z = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5 * (z[1] - z[0])
    y = ScaledActivation(name)(z)
    mean = (y * density).sum()
    assert float(((y - mean) ** 2 * density).sum()) == pytest.approx(1.0, rel=4e-3)


# A 3x3 convolution of stride 2 over ones counts the pixels in its window: TensorFlow pads even sizes at the end only.
@pytest.mark.parametrize(("size", "counts"), [(4, [3, 2]), (5, [2, 3, 2]), (1, [1]), (6, [3, 3, 2])])
def test_padding_is_at_the_end_first(size: int, counts: list[int]) -> None:
    x, left = padded(torch.ones(1, 1, size, size), 3, 2, "same")
    out = F.conv2d(x, torch.ones(1, 1, 3, 3), stride=2, padding=left)[0, 0]
    np.testing.assert_allclose(out.numpy(), np.outer(counts, counts))


def test_a_constant_filter_is_floored_and_not_divided_by_zero() -> None:
    conv = WSConv2d(4, 2, 3)
    nn.init.constant_(conv.weight, 0.7)
    assert float(conv.standardised_weight().detach().abs().max()) < 1e-4


def test_small_filters_keep_their_size_below_the_floor() -> None:
    # var * fan_in = 1e-6 lies under the floor 1e-4: the filter is multiplied by 100 and not brought to unit norm.
    conv = WSConv2d(1, 1, 2)
    row = torch.tensor([1.0, -1.0, 1.0, -1.0]) * 0.5e-3
    conv.weight.data.copy_(row.view(1, 1, 2, 2))
    torch.testing.assert_close(conv.standardised_weight().detach().flatten(), 100 * row)


def test_gain_and_bias_act_per_output_channel() -> None:
    conv, x = WSConv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    plain = conv(x).detach()
    conv.gain.data = torch.tensor([1.0, 2.0, 0.0, -1.0])
    conv.bias.data = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(conv(x).detach(), plain * conv.gain.view(4, 1, 1) + conv.bias.view(4, 1, 1))


@pytest.mark.parametrize("size", [2, 5, 6, 7])
def test_average_pooling_keeps_the_mean_of_what_is_in_the_window(size: int) -> None:
    x = torch.randn(1, 2, size, size)
    out = avg_pool_same(x, 2)
    for i in range(-(-size // 2)):
        for j in range(-(-size // 2)):
            torch.testing.assert_close(out[..., i, j], x[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)))


def test_rescaled_stochastic_depth_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = StochasticDepth(0.25, rescale=True).train()(torch.ones(1, 1, 1, 1), torch.ones(4096, 1, 1, 1))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)


SMALL = {
    "odd channels, one group": Variant(
        name="a", depths=(1, 2), widths=(24, 40), strides=(1, 2), stem_widths=(8, 12), stem_strides=(2, 1)
    ),
    "several groups": Variant(name="b", depths=(2, 1), widths=(32, 64), strides=(2, 2), group_width=8, final_width=48),
    "rounded": Variant(
        name="c",
        depths=(1,),
        widths=(40,),
        strides=(1,),
        group_width=16,
        rounded_bottleneck=True,
        stem_widths=(8, 8, 8, 8),
    ),
}


@pytest.mark.parametrize("variant", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("px", [17, 32])
def test_every_parameter_of_any_small_variant_gets_a_gradient(variant: Variant, px: int) -> None:
    torch.manual_seed(0)
    model = NFNet(variant, 5)
    for block in model.blocks:
        nn.init.ones_(block.skip_gain)  # type: ignore[arg-type]
    F.cross_entropy(model(torch.randn(4, 3, px, px)), torch.arange(4)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not float(p.grad.abs().sum()) > 0]


def test_stochastic_depth_grows_with_the_block_and_never_reaches_its_maximum() -> None:
    model = NFNet(SMALL["several groups"], 5, stochastic_depth=0.3)
    rates = [m.rate for m in model.modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
