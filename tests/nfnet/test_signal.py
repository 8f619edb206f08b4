"""Signal propagation at initialisation (Brock et al. 2021a, section 3): what a block does to variance and mean."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nfnet
from nfnet.layers import WSConv2d
from nfnet.model import NFNet
from nfnet.variants import Variant

# Two stages without pooling, wide enough for averages over channels to be sharp.
WIDE = Variant(
    name="wide",
    depths=(3, 3),
    widths=(384, 512),
    strides=(1, 1),
    stem_widths=(256, 384),
    stem_strides=(1, 1),
    bottleneck=1.0,
)


def open_network(variant: Variant, activation: str) -> NFNet:
    """Skip gains 1 and gates at one half (doubled: one), so that branches have the variance that the books expect."""
    torch.manual_seed(0)
    model = NFNet(variant, 5, activation=activation)
    for block in model.blocks:
        nn.init.ones_(block.skip_gain)  # type: ignore[arg-type]
        nn.init.zeros_(block.squeeze_excite.expand.weight)  # type: ignore[union-attr, arg-type]
    return model


def periodic(self: WSConv2d, x: torch.Tensor) -> torch.Tensor:
    """The same convolution without borders: the zeros around an image take variance away, which is not the law."""
    x = F.pad(x, (self.kernel // 2,) * 4, mode="circular")
    return F.conv2d(x, self.standardised_weight(), self.bias, self.stride, groups=self.groups)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_variance_is_one_plus_alpha_squared_a_block_and_starts_again_at_a_transition(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WSConv2d, "forward", periodic)
    found = nfnet.signal_propagation(open_network(WIDE, activation), torch.randn(8, 3, 16, 16))
    expected = [1 + 0.2**2 * b for b in (0, 1, 2, 3, 1, 2, 3)]
    np.testing.assert_allclose(found.variance, expected, rtol=0.02)
    np.testing.assert_allclose(found.residual_variance, np.ones(6), rtol=0.04)
    assert max(found.squared_mean) < 0.01


def test_the_pooled_shortcut_divides_the_variance_of_white_noise_by_four(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why plots on noise show saw teeth: 2x2 averages of independent pixels; the branch, strided, is not averaged.
    monkeypatch.setattr(WSConv2d, "forward", periodic)
    one_by_one = Variant(
        name="pooled", depths=(1, 1), widths=(256, 256), strides=(1, 2), stem_widths=(256,), stem_strides=(1,)
    )
    found = nfnet.signal_propagation(open_network(one_by_one, "relu"), torch.randn(8, 3, 16, 16))
    assert found.variance[2] == pytest.approx(1 / 4 + 0.2**2, rel=0.1)


def test_with_skip_gains_of_zero_the_variance_stays_where_the_shortcut_puts_it() -> None:
    torch.manual_seed(0)
    found = nfnet.signal_propagation(NFNet(WIDE, 5, activation="relu"), torch.randn(2, 3, 16, 16))
    assert found.variance[1] == pytest.approx(found.variance[3], rel=1e-5)


def test_measuring_leaves_the_mode_and_the_hooks_as_they_were() -> None:
    model = nfnet.create_model("nfnet_tiny", num_classes=5)
    found = nfnet.signal_propagation(model, torch.randn(1, 3, 32, 32))
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    assert len(found.variance) == len(found.squared_mean) == len(found.residual_variance) + 1
