"""Signal propagation at initialisation (Brock et al. 2021a, section 3): what a block does to variance and mean."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.layers import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model

import nfnet
from nfnet.analysis.signal_propagation import open_branches, residual_blocks
from nfnet.analysis.signal_theory import bn_relu_conv, normaliser_free, predict, predict_on_noise
from nfnet.layers import WSConv2d
from nfnet.model import NFNet
from nfnet.variants import Variant, get_variant

# Two stages without pooling, wide enough for averages over channels to be sharp.
SIZES = {"depths": (3, 3), "widths": (384, 512), "strides": (1, 1), "stem_strides": (1, 1)}
WIDE = Variant(name="wide", **SIZES, stem_widths=(256, 384), bottleneck=1.0)
FAMILIES = {
    "nfnet": WIDE,
    "nf_resnet": replace(
        get_variant("nf_resnet50"), **SIZES, stem_widths=(256, 384), stem_kernel=3, stem_pool=False, bottleneck=1.0
    ),
    "nf_regnet": replace(get_variant("nf_regnet_b0"), **SIZES, stem_widths=(256, 384), expansion=1.0, final_width=64),
}


def open_network(variant: Variant, activation: str | None = None, channels: int = 3) -> NFNet:
    """Skip gains 1 and gates at one half (doubled: one), so that branches have the variance that the books expect."""
    torch.manual_seed(0)
    model = NFNet(variant, 5, activation=activation, in_chans=channels)
    open_branches(model)
    for block in model.blocks:
        if block.squeeze_excite is not None:
            nn.init.zeros_(block.squeeze_excite.expand.weight)  # type: ignore[union-attr, arg-type]
    return model


def noise(size: int, px: int, channels: int = 3) -> torch.Tensor:
    """White noise whose channels have variance 1 exactly: so few pixels would otherwise be off by two per cent."""
    images = torch.randn(size, channels, px, px, generator=torch.Generator().manual_seed(1))
    std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0, keepdim=True)
    return (images - mean) / std


def periodic(self: WSConv2d, x: torch.Tensor) -> torch.Tensor:
    """The same convolution without borders: the zeros around an image take variance away, which is not the law."""
    x = F.pad(x, (self.kernel // 2,) * 4, mode="circular")
    return F.conv2d(x, self.standardised_weight(), self.bias, self.stride, groups=self.groups)


@pytest.mark.parametrize(("family", "activation"), [*((f, None) for f in FAMILIES), ("nfnet", "relu")])
def test_variance_is_one_plus_alpha_squared_a_block_and_starts_again_at_a_transition(
    family: str, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WSConv2d, "forward", periodic)
    model = open_network(FAMILIES[family], activation)
    found = nfnet.signal_propagation(model, noise(8, 16))
    assert found.transitions == [False, False, False, True, False, False]
    expected = [1 + 0.2**2 * b for b in (0, 1, 2, 3, 1, 2, 3)]
    np.testing.assert_allclose(found.variance, expected, rtol=0.02)
    np.testing.assert_allclose(found.residual_variance, np.ones(6), rtol=0.04)
    assert max(found.squared_mean) < 0.01
    assert predict(model).variance == pytest.approx(expected)


class HeNet(ResNetV2):
    """timm's pre-activation ResNet, wide, initialised as He et al. have it."""

    def __init__(self) -> None:
        super().__init__(
            (3, 3), (512, 512), bottle_ratio=0.5, conv_layer=create_conv2d, norm_layer=BatchNormAct2d, num_classes=2
        )
        self.stem.pool = nn.Identity()  # a maximum is not normally distributed, and the law is about what is
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def test_bn_relu_conv_adds_one_minus_one_over_pi_a_block() -> None:
    torch.manual_seed(0)
    model = HeNet()
    found = nfnet.signal_propagation(model, noise(8, 48))
    # b + 1 after b blocks of each stage; index 0 is the stem.
    share = 1 - 1 / math.pi
    np.testing.assert_allclose(found.variance[1:], [share * (b + 1) for b in (1, 2, 3, 1, 2, 3)], rtol=0.02)
    np.testing.assert_allclose(found.residual_variance, np.full(6, share), rtol=0.02)
    np.testing.assert_allclose(found.squared_mean[1:], [(b + 1) / math.pi for b in (1, 2, 3, 1, 2, 3)], rtol=0.1)
    np.testing.assert_allclose(predict(model).variance[1:], bn_relu_conv(found.transitions).variance[1:], rtol=0.02)


def test_conv_bn_relu_follows_its_law() -> None:
    torch.manual_seed(0)
    model = get_model("resnet50")
    found, law = nfnet.signal_propagation(model, noise(4, 96)), predict(model)
    np.testing.assert_allclose(found.variance[1:], law.variance[1:], rtol=0.03)
    np.testing.assert_allclose(found.residual_variance, law.residual_variance, rtol=1e-3)
    np.testing.assert_allclose(found.squared_mean[1:], law.squared_mean[1:], rtol=0.05, atol=1e-3)


def test_the_pooled_shortcut_divides_the_variance_of_white_noise_by_four(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why plots on noise show saw teeth: 2x2 averages of independent pixels; the branch, strided, is not averaged.
    monkeypatch.setattr(WSConv2d, "forward", periodic)
    pooled = replace(WIDE, depths=(1, 2), widths=(256, 384), strides=(1, 2), stem_widths=(256,), stem_strides=(1,))
    # Standardised weights sum to zero, so that any two of n correlate by -1/(n - 1), and so do pixels side by side in the stem's
    # map, which share most of their n inputs. With images of three channels that alone takes 4 % of a pooled variance.
    channels = 64
    model = open_network(pooled, "relu", channels)
    found, law = nfnet.signal_propagation(model, noise(8, 16, channels)), predict_on_noise(model)
    assert law is not None and law.variance[2] == pytest.approx(1 / 4 + 0.2**2, rel=1e-2)
    np.testing.assert_allclose(found.variance, law.variance, rtol=0.03)
    np.testing.assert_allclose(found.residual_variance, law.residual_variance, rtol=0.04)
    assert predict_on_noise(open_network(WIDE)) is None


def test_with_skip_gains_of_zero_the_variance_stays_where_the_shortcut_puts_it() -> None:
    torch.manual_seed(0)
    model = NFNet(WIDE, 5, activation="relu")
    found = nfnet.signal_propagation(model, torch.randn(2, 3, 16, 16))
    assert found.variance[1] == pytest.approx(found.variance[3], rel=1e-5)
    assert predict(model).variance == [1.0] * 7


def test_half_open_branches_add_a_quarter() -> None:
    model = NFNet(replace(WIDE, widths=(64, 96), stem_widths=(64,), stem_strides=(1,)), 5)
    open_branches(model, 0.5)
    law = normaliser_free([False, False, False, True, False, False], [0.5] * 6)
    assert predict(model).variance == law.variance
    assert law.variance[3] == pytest.approx(1 + 3 * 0.01) and law.variance[4] == pytest.approx(1.01)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_a_peers_block_is_read_after_its_sum_and_at_the_end_of_its_branch(name: str) -> None:
    # torchvision's blocks add and rectify in place; here the same is computed out of place, in training mode.
    torch.manual_seed(0)
    model = get_model(name)
    images = torch.randn(4, 3, 64, 64)
    found = nfnet.signal_propagation(model, images)
    plain = copy.deepcopy(model).train()
    x = plain.maxpool(F.relu(plain.bn1(plain.conv1(images))))
    sums, branches = [x], []
    for block in (b for layer in (plain.layer1, plain.layer2, plain.layer3, plain.layer4) for b in layer):
        shortcut = x if block.downsample is None else block.downsample(x)
        f = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        if name == "resnet50":
            f = block.bn3(block.conv3(F.relu(f)))
        branches.append(f)
        sums.append(f + shortcut)
        x = F.relu(sums[-1])
    variance = lambda y: float(y.var(dim=(0, 2, 3), correction=0).mean())  # noqa: E731
    squared = lambda y: float(y.mean(dim=(0, 2, 3)).square().mean())  # noqa: E731
    np.testing.assert_allclose(found.variance, [variance(y) for y in sums], rtol=1e-4)
    np.testing.assert_allclose(found.squared_mean, [squared(y) for y in sums], rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.residual_variance, [variance(y) for y in branches], rtol=1e-4)


def test_measuring_leaves_modes_hooks_and_running_statistics_as_they_were() -> None:
    model = get_model("resnet18").train()
    model.layer3.eval()  # a network that is frozen in part
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    found = nfnet.signal_propagation(model, torch.randn(2, 3, 64, 64))
    assert [m.training for m in model.modules()] == modes
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(found.variance) == len(found.squared_mean) == len(found.residual_variance) + 1 == 9


def test_a_network_without_blocks_and_one_without_a_law_are_refused() -> None:
    with pytest.raises(ValueError, match="no residual blocks"):
        residual_blocks(get_model("vgg11", weights=None))
    with pytest.raises(ValueError, match="no law"):
        predict(get_model("convnext_tiny"))
