"""The law that defines each method, against torch, timm, or numbers that can be had without it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nfnet.normalizers.method import ConvSite, Method, NormSite
from nfnet.normalizers.registry import make_method
from nfnet.trunks.networks import create

pytestmark = pytest.mark.filterwarnings("ignore")


def images(num: int = 8, channels: int = 8, px: int = 5, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, channels, px, px, generator=torch.Generator().manual_seed(seed)) * 2 + 0.7


def norm_of(method: Method, channels: int = 8, **site: object) -> nn.Module:
    return method.norm_act(NormSite(channels=channels, activation="identity", **site))  # type: ignore[arg-type]


def made(name: str, **settings: object) -> nn.Module:
    return norm_of(make_method(name, **settings))


# --- statistics of a batch --------------------------------------------------------------------------------------------


def test_batch_norm_is_torchs_in_training_and_after() -> None:
    ours, theirs = made("batch_norm"), nn.BatchNorm2d(8)
    for seed in range(3):
        torch.testing.assert_close(ours(images(seed=seed)), theirs(images(seed=seed)))
    torch.testing.assert_close(ours.eval()(images()), theirs.eval()(images()))


def test_groups_are_batch_norm_of_each_part_and_share_one_step_of_the_averages() -> None:
    x = images()
    ours, parts = made("batch_norm", stat_group=2), [nn.BatchNorm2d(8) for _ in range(4)]
    torch.testing.assert_close(ours(x), torch.cat([bn(c) for bn, c in zip(parts, x.split(2), strict=True)]))
    mean = torch.stack([bn.running_mean for bn in parts]).mean(0)
    torch.testing.assert_close(ours[0].running_mean, mean)


def test_ghost_batches_move_the_averages_one_after_the_other() -> None:
    x, theirs = images(), nn.BatchNorm2d(8)
    ours = made("ghost_batch_norm", stat_group=2)
    torch.testing.assert_close(ours(x), torch.cat([theirs(c) for c in x.split(2)]))
    torch.testing.assert_close(ours[0].running_mean, theirs.running_mean)
    torch.testing.assert_close(ours[0].running_var, theirs.running_var)


@pytest.mark.parametrize(("group", "share"), [(2, 0.499), (4, 0.753), (16, 0.940)])
def test_small_groups_see_too_little_variance(group: int, share: float) -> None:
    """Mean of the biased variance over groups: (g - 1) / g."""
    x = torch.randn(16 * 4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    var = torch.var_mean(x.view(-1, group), dim=1, correction=0)[0].mean()
    assert float(var) == pytest.approx(share, abs=0.01)


def test_one_value_a_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="one value a channel has no variance"):
        made("batch_norm", stat_group=1)(images(px=1))
    with pytest.raises(ValueError, match="8 does not divide into groups of 3"):
        made("batch_norm", stat_group=3)(images())
    for name in ("batch_norm", "batch_renorm", "batch_kalman_norm", "independent_component", "last_layer_norm"):
        with pytest.raises(ValueError, match="set batch and stat_group to 2 or more"):
            make_method(name).check_batch(1)


def test_renorm_is_batch_norm_while_its_limits_are_closed() -> None:
    torch.testing.assert_close(made("batch_renorm")(images()), nn.BatchNorm2d(8)(images()))


def test_renorm_without_limits_normalises_by_the_running_values() -> None:
    ours = made("batch_renorm").double()
    ours[0].running_mean.uniform_(-0.1, 0.1)
    ours[0].running_std.uniform_(0.9, 1.1)
    ours[0].num_steps += 1e6
    mean, std = ours[0].running_mean.clone(), ours[0].running_std.clone()
    x = images().double()
    torch.testing.assert_close(ours(x), (x - mean[:, None, None]) / std[:, None, None])


def test_kalman_is_batch_norm_where_nothing_is_predicted() -> None:
    ours = chain(make_method("batch_kalman_norm", p=0.0))
    theirs = chain(make_method("batch_norm"))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()))


def chain(method: Method) -> nn.Sequential:
    torch.manual_seed(0)
    first = method.conv(ConvSite(in_channels=8, out_channels=16, kernel=3))
    one = method.norm_act(NormSite(channels=16, activation="relu", after=(first,)))
    second = method.conv(ConvSite(in_channels=16, out_channels=8, kernel=3, groups=2, reads=one))
    two = method.norm_act(NormSite(channels=8, activation="relu", after=(second,)))
    return nn.Sequential(first, one, second, two)


def test_kalman_with_p_1_ignores_the_batch() -> None:
    net = chain(make_method("batch_kalman_norm", p=1.0))
    net(images())
    first = net[3][0].belief
    net(images(seed=5) * 3)
    torch.testing.assert_close(net[3][0].belief, first)


@pytest.mark.parametrize("prediction", ["sound", "faithful"])
def test_kalmans_prediction_is_what_white_input_gives(prediction: str) -> None:
    """Where the layer below really gives N(0, 1), both predict the statistics of the pixels off the edge."""
    net = chain(make_method("batch_kalman_norm", p=1.0, prediction=prediction))
    x = torch.randn(64, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        net[1][0].moments = lambda groups: (groups.new_zeros(1, 16), groups.new_ones(1, 16))
        net[1][0].belief = torch.zeros(1, 16), torch.ones(1, 16)
        white = torch.randn(64, 16, 12, 12, generator=torch.Generator().manual_seed(1))
        seen = net[2](white.relu())[:, :, 1:-1, 1:-1]
        net(x)
    mean, var = net[3][0].belief
    v, m = torch.var_mean(seen, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean[0], m, atol=0.15, rtol=0.1)
    torch.testing.assert_close(var[0], v, atol=0.05, rtol=0.15)


def test_kalmans_filter_is_the_variance_of_a_mixture() -> None:
    a, b = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0))
    a, b, p = a * 0.8 + 0.3, b * 1.4 - 0.5, 0.3
    mixed = torch.where(torch.rand(400_000, generator=torch.Generator().manual_seed(1)) < p, a, b)
    formula = p * a.var() + (1 - p) * b.var() + p * (1 - p) * (a.mean() - b.mean()) ** 2
    assert float(mixed.var()) == pytest.approx(float(formula), rel=0.01)


@pytest.mark.parametrize(("mean", "factors"), [(0.0, (0.95, 0.70, 0.50)), (1.0, (0.903, 0.540, 0.329))])
def test_dropouts_factor_on_correlations_is_the_keep_rate_for_zero_mean_only(
    mean: float, factors: tuple[float, ...]
) -> None:
    """p / (1 + (1 - p) m^2 / sigma^2): why the normalisation stands before the dropout."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(200_000, 1, generator=g)
    x = (common + 0.3 * torch.randn(200_000, 2, generator=g)) / 1.09**0.5 + mean
    for keep, factor in zip((0.95, 0.7, 0.5), factors, strict=True):
        dropped = x * (torch.rand(x.shape, generator=g) < keep)
        corr = torch.corrcoef(dropped.T)[0, 1] / torch.corrcoef(x.T)[0, 1]
        assert float(corr) == pytest.approx(factor, abs=0.012)


@pytest.mark.parametrize(("dropout_first", "factor"), [(False, 0.70), (True, 0.540)])
def test_independent_components_factor_is_the_keep_rate_in_its_order_only(dropout_first: bool, factor: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(100_000, 1) + 0.3 * torch.randn(100_000, 2)) / 1.09**0.5 + 1
    method = make_method("independent_component", drop_rate=0.3, dropout_first=dropout_first)
    out = method.norm_act(NormSite(channels=2, activation="identity"))(x[:, :, None, None]).detach().flatten(1)
    corr = torch.corrcoef(out.T)[0, 1] / torch.corrcoef(x.T)[0, 1]
    assert float(corr) == pytest.approx(factor, abs=0.015)


def test_independent_component_stands_behind_the_activation() -> None:
    ours = make_method("independent_component", drop_rate=0.0).norm_act(NormSite(channels=8, activation="relu"))
    torch.testing.assert_close(ours(images()), nn.BatchNorm2d(8)(images().relu()))


def test_preconditionings_step_is_that_of_the_normalised_layer() -> None:
    """After one SGD step of any rate, both layers are the same function of any input."""
    torch.manual_seed(0)
    x, target = images(16, 6).double(), torch.randn(16, 4, 5, 5).double()
    conv = (
        make_method("preconditioning", average=0.0, floor=0.0, eps=0.0)
        .conv(ConvSite(in_channels=6, out_channels=4, kernel=1))
        .double()
    )
    var, mean = (v[:, None, None] for v in torch.var_mean(x, dim=(0, 2, 3), correction=0))
    normalised = nn.Conv2d(6, 4, 1).double()
    with torch.no_grad():  # the same function: w (x - m) / s + b' = (w / s) x + (b' - w m / s)
        normalised.weight.copy_(conv.weight * var.sqrt())
        normalised.bias.copy_(conv.bias + (conv.weight * mean).sum((1, 2, 3)))
    for net, seen in ((conv, x), (normalised, (x - mean) / var.sqrt())):
        F.mse_loss(net(seen), target, reduction="sum").backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.3 * p.grad
    conv.eval()
    fresh = images(16, 6, seed=9).double()
    torch.testing.assert_close(conv(fresh), normalised((fresh - mean) / var.sqrt()))


# --- statistics of a sample -------------------------------------------------------------------------------------------


def test_group_layer_and_instance_norm_are_torchs() -> None:
    x = images()
    torch.testing.assert_close(made("group_norm", groups=4)(x), F.group_norm(x, 4))
    torch.testing.assert_close(made("layer_norm")(x), F.layer_norm(x, x.shape[1:]))
    torch.testing.assert_close(made("instance_norm")(x), F.instance_norm(x))
    with pytest.raises(ValueError, match="3 groups do not divide 8 channels"):
        made("group_norm", groups=3)
    with pytest.raises(ValueError, match="maps of one position"):
        made("instance_norm")(images(px=1))


def test_standardised_filters_are_timms() -> None:
    std_conv = pytest.importorskip("timm.layers").StdConv2d
    theirs = std_conv(8, 4, 3, padding=1, eps=1e-5)
    ours = make_method("group_norm_ws").conv(ConvSite(in_channels=8, out_channels=4, kernel=3))
    ours.load_state_dict({"weight": theirs.weight.detach()})
    torch.testing.assert_close(ours(images()), theirs(images()))


def test_standardised_filters_have_the_fan_ins_length_and_gradients_of_zero_mean() -> None:
    ours = make_method("group_norm_ws").conv(ConvSite(in_channels=8, out_channels=4, kernel=3)).double()
    filters = ours.filters()
    torch.testing.assert_close(filters.square().sum((1, 2, 3)), torch.full((4,), 72.0).double(), rtol=1e-3, atol=0)
    filters.pow(3).sum().backward()
    assert float(ours.weight.grad.sum((1, 2, 3)).abs().max()) < 1e-9
    cosine = F.cosine_similarity(ours.weight.grad.flatten(1), filters.detach().flatten(1))
    assert float(cosine.abs().max()) < 1e-3


def test_filter_response_norm_is_timms_and_has_unit_mean_square() -> None:
    theirs = pytest.importorskip("timm.layers").FilterResponseNormTlu2d(8, eps=1e-5)
    nn.init.normal_(theirs.bias)
    nn.init.normal_(theirs.tau)
    ours = made("filter_response_norm", eps=1e-5)
    ours.load_state_dict({"weight": theirs.weight, "bias": theirs.bias, "threshold": theirs.tau})
    torch.testing.assert_close(ours(images()), theirs(images()))
    out = ours.normalised(images())
    torch.testing.assert_close(out.square().mean((2, 3)), torch.ones(8, 8), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.normalised(images() * 7), out, rtol=1e-4, atol=1e-4)


def test_filter_response_norm_of_one_position_needs_a_learned_eps() -> None:
    with pytest.raises(ValueError, match="needs learned_eps"):
        made("filter_response_norm")(images(px=1))
    made("filter_response_norm", learned_eps=True)(images(px=1))


@pytest.mark.parametrize("name", ["layer_norm_proxy", "group_norm_proxy"])
def test_the_proxy_comes_out_with_zero_mean_and_its_variance(name: str) -> None:
    """V / (V + 0.03), of ReLU 0.919; the grid itself has 0.3384 for V."""
    layer = make_method(name).norm_act(NormSite(channels=8, activation="relu"))
    from nfnet.normalizers.gaussian import activation_moments, quantiles

    mean, var = activation_moments(torch.relu, torch.zeros(1), torch.ones(1))
    assert (float(mean), float(var)) == pytest.approx((0.39845, 0.33803), abs=2e-4)
    z = (quantiles(mean).relu() - mean) * torch.rsqrt(var + 0.03)
    assert float(z.mean()) == pytest.approx(0, abs=1e-6)
    assert float(z.var(correction=0)) == pytest.approx(0.919, abs=1e-3)
    white = torch.randn(64, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    v, m = torch.var_mean(layer(white), correction=0)
    assert float(m) == pytest.approx(0, abs=0.01)
    assert float(v) == pytest.approx(0.919, abs=0.02)


def power_shares(name: str, depth: int = 10) -> tuple[float, float, float]:
    """Of a random ReLU network: shares of the second moment that are constant over samples and positions; the variance between
    samples of a map's mean; and of its standard deviation."""
    torch.manual_seed(0)
    method, x = make_method(name), torch.randn(32, 128, 8, 8)
    with torch.no_grad():
        for _ in range(depth):
            conv = method.conv(ConvSite(in_channels=128, out_channels=128, kernel=3))
            norm = method.norm_act(NormSite(channels=128, activation="relu"))
            for n, p in norm.named_parameters():
                if n.endswith(("weight", "bias")):
                    nn.init.normal_(p, mean=float(n.endswith("weight")), std=0.2)
            pre, x = conv(x), norm(conv(x))
            del pre
        y = F.instance_norm(x) if name == "instance_norm" else x
    if name == "instance_norm":  # of the normalised maps, before the affine map and the activation
        x = y
    power = x.square().mean((0, 2, 3))
    means = x.mean((2, 3))
    constant = means.mean(0).square()
    of_mean = means.var(0, correction=0)
    of_std = x.std((2, 3), correction=0).var(0, correction=0)
    return tuple(float(part.sum() / power.sum()) for part in (constant, of_mean, of_std))  # type: ignore[return-value]


def test_layer_norms_channels_become_constant_and_the_proxy_mends_it() -> None:
    assert power_shares("layer_norm")[0] > 0.4 > 0.35 > power_shares("batch_norm")[0]
    assert power_shares("layer_norm_proxy")[0] < 0.05


def test_instance_norm_leaves_no_variability_between_samples() -> None:
    assert max(power_shares("instance_norm", depth=2)[1:]) < 1e-6


def test_dynamic_tanh_is_bounded_odd_and_linear_for_small_input() -> None:
    x = images()
    for name, slope in (("dynamic_tanh", 0.5), ("dynamic_erf", 0.5 * 2 / torch.pi**0.5)):
        layer = made(name)
        assert float(layer(100 * x).detach().abs().max()) <= 1
        torch.testing.assert_close(layer(-x), -layer(x))
        torch.testing.assert_close(layer(1e-3 * x), slope * 1e-3 * x, rtol=1e-3, atol=1e-6)


# --- weights and branches ---------------------------------------------------------------------------------------------


def test_weight_norm_is_torchs_and_its_gradient_is_orthogonal_to_the_direction() -> None:
    ours = make_method("weight_norm").conv(ConvSite(in_channels=8, out_channels=4, kernel=3))
    theirs = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 3, padding=1))
    with torch.no_grad():
        theirs.parametrizations.weight.original1.copy_(ours.weight)
        theirs.parametrizations.weight.original0.copy_(ours.gain.view(4, 1, 1, 1))
        theirs.bias.copy_(ours.bias)
    torch.testing.assert_close(ours(images()), theirs(images()))
    ours(images()).pow(3).sum().backward()
    cosine = F.cosine_similarity(ours.weight.grad.flatten(1), ours.weight.detach().flatten(1))
    assert float(cosine.abs().max()) < 1e-5


def test_weight_norms_start_gives_each_layer_zero_mean_and_unit_variance() -> None:
    from nfnet.normalizers.weight.weight_norm import data_dependent_start

    net = nn.Sequential(
        *(make_method("weight_norm").conv(ConvSite(in_channels=8, out_channels=8, kernel=3)) for _ in "ab")
    )
    data_dependent_start(net, images())
    var, mean = torch.var_mean(net(images()), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(var, torch.ones(8))
    torch.testing.assert_close(mean, torch.zeros(8), atol=1e-5, rtol=0)


def gradients(net: nn.Module, steps: int) -> list[set[str]]:
    """Names of the parameters with a gradient, step by step."""
    optimiser, found = torch.optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(steps):
        loss = F.cross_entropy(net(images(8, 3, 16)), torch.arange(8) % 3)
        net.zero_grad()
        loss.backward()
        found.append({n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()})
        optimiser.step()
    return found


def test_fixup_starts_with_zero_logits_and_moves_the_classifier_first() -> None:
    torch.manual_seed(0)
    net = create("resnet_v2_tiny", 4, method="fixup")
    assert not net(images(8, 3, 16)).any()
    first, second, third = gradients(net, 3)
    assert first == {"head.weight", "head.bias"}
    assert "stem.0.weight" in second
    assert "blocks.0.branch.0.weight" not in second
    assert third == {n for n, _ in net.named_parameters()}


def test_fixup_scales_the_first_convolutions_by_the_depth() -> None:
    torch.manual_seed(0)
    deep = create("resnet_v2_deep", 4, method="fixup")
    stds = [float(b.convs[0].weight.std()) for b in deep.blocks]
    assert sum(stds) / len(stds) == pytest.approx((2 / 144) ** 0.5 * 40**-0.5, rel=0.02)


def test_fixups_scalars_move_at_a_tenth_of_the_rate() -> None:
    from nfnet.normalizers.weight.fixup import Scalar

    scalar = Scalar(1.0)
    (3 * scalar()).sum().backward()
    with torch.no_grad():
        scalar.value -= 0.5 * scalar.value.grad
    assert float(scalar().detach()) == pytest.approx(1 - 0.1 * 0.5 * 3)


def test_skip_init_is_the_identity_at_the_start_and_opens_at_the_second_step() -> None:
    torch.manual_seed(0)
    net = create("resnet_v2_deep", 4, method="skip_init", depths=(5,))
    x = net.stem(images(8, 3, 16))
    torch.testing.assert_close(nn.Sequential(*net.blocks)(x), x)
    first, second = gradients(net, 2)
    assert not any("branch.0" in n for n in first)
    assert second == {n for n, _ in net.named_parameters()}


def test_normaliser_free_variance_grows_by_alpha_squared_a_block() -> None:
    torch.manual_seed(0)
    net = create("resnet_v2_tiny", 4, method="normalizer_free", skip_init=1.0, depths=(4, 1, 1), widths=(128, 128, 128))
    with torch.no_grad():
        x = net.stem(torch.randn(16, 3, 32, 32))
        x = x / x.std()
        variances = []
        for block in net.blocks[:4]:
            x = block(x)
            variances.append(float(x.var(dim=(0, 2, 3)).mean()))
    growth = (variances[-1] - variances[0]) / 3
    assert growth == pytest.approx(0.04, rel=0.3)
