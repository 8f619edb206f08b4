"""Laws of the networks and of the update."""

import copy

import pytest
import torch
from torch import nn

import nfnet
from nfnet.functional import same_padding
from nfnet.layers import WSConv2d, avg_pool_same
from nfnet.optim import param_groups
from nfnet.optim.agc import adaptive_clip_grad_
from nfnet.optim.losses import label_smoothing_cross_entropy
from nfnet.optim.schedule import learning_rate, linear_scaling
from nfnet.optim.sgd import SGD
from tests.nfnet import agc_reference


def tiny(**options: object) -> nfnet.NFNet:
    torch.manual_seed(0)
    return nfnet.create_model("nfnet_tiny", num_classes=10, **options)


FAMILIES = ["nfnet_tiny", "nf_resnet50", "nf_regnet_b0"]


def family(name: str, **options: object) -> nfnet.NFNet:
    torch.manual_seed(0)
    return nfnet.create_model(name, num_classes=10, **options)


def with_gradients(model: nn.Module, scale: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return model


def test_standardised_filters_have_zero_mean_and_unit_fan_in_norm() -> None:
    conv = WSConv2d(16, 24, 3, groups=2)
    nn.init.normal_(conv.weight, mean=0.3, std=2.0)
    rows = conv.standardised_weight().flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(24), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (5, 1, 1), (9, 3, 1)])
def test_same_padding_gives_the_ceiling_of_size_over_stride(size: int, kernel: int, stride: int) -> None:
    low, high = same_padding(size, kernel, stride)
    assert (size + low + high - kernel) // stride + 1 == -(-size // stride) and 0 <= high - low <= 1


def test_pooling_at_an_odd_edge_counts_only_pixels_of_the_image() -> None:
    out = avg_pool_same(torch.ones(1, 1, 5, 5), 2)
    assert out.shape == (1, 1, 3, 3) and bool((out == 1).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = family(name, head_init="normal", skip_init=1.0)
    model(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_closed_branches_and_a_head_of_zeros_still_start_to_learn(name: str) -> None:
    # SkipInit 0 holds back the branches' gradients, a head of zeros those of all features: not the gains', nor the head's.
    model = family(name, head_init="normal")
    model(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if n.endswith("skip_gain"))
    model = family(name, head_init="zero")
    nn.functional.cross_entropy(model(torch.randn(2, 3, 48, 48)), torch.tensor([0, 1])).backward()
    assert bool(model.head.weight.grad.any()) and bool(model.head.bias.grad.any())


@pytest.mark.parametrize("head_init", ["normal", "zero"])
@pytest.mark.parametrize("name", FAMILIES)
def test_poisoned_weights_are_all_made_anew(name: str, head_init: str) -> None:
    model = family(name, head_init=head_init)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not list(model.buffers())  # reset_parameters would have to make those anew as well
    assert bool(model.head.weight.any()) == (head_init == "normal")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_filter_of_each_family_is_standardised(name: str) -> None:
    model = family(name)
    convs = [m for m in model.modules() if isinstance(m, WSConv2d)]
    assert len(convs) > 20
    for conv in convs:
        nn.init.normal_(conv.weight, mean=0.3, std=2.0)
        nn.init.uniform_(conv.gain, -2.0, 2.0)
        rows = conv.standardised_weight().detach().double().flatten(1)
        assert float(rows.mean(1).abs().max()) < 1e-6
        torch.testing.assert_close(rows.norm(dim=1), conv.gain.detach().double().abs(), rtol=1e-5, atol=0)


def test_zero_skip_gains_leave_the_shortcut_alone() -> None:
    model = tiny().eval()
    block = model.blocks[2]
    assert block.conv_shortcut is None
    x = torch.randn(2, 192, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", nfnet.list_models())
def test_each_parameter_matches_exactly_one_rule(name: str) -> None:
    with torch.device("meta"):
        model = nfnet.create_model(name)
    parameters = dict(model.named_parameters())
    rules = param_groups.assign(parameters.items())
    assert set(rules) == set(parameters)
    assert [n for n, r in rules.items() if not r.clip] == ["head.weight"]
    assert all(r.decay == (parameters[n].dim() > 1) for n, r in rules.items())


def test_clipping_equals_the_plain_loop_over_units() -> None:
    fast, plain = with_gradients(tiny(), 0.01), with_gradients(tiny(), 0.01)
    counts = adaptive_clip_grad_(fast.named_parameters())
    agc_reference.adaptive_clip_grad_(plain.named_parameters())
    assert 0 < int(counts.num_clipped) <= int(counts.num_units)
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=0, msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_after_clipping_no_unit_exceeds_its_bound_and_small_ones_are_untouched(name: str) -> None:
    model = with_gradients(family(name), 1e-4)
    model.blocks[0].conv0.weight.grad[3] *= 1e4  # type: ignore[union-attr]
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    clipped = int(adaptive_clip_grad_(model.named_parameters(), clipping=0.01).num_clipped)
    seen_clipped = seen_small = 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        if key == "head.weight":
            assert torch.equal(parameter.grad, before[key])
            continue
        units = parameter.shape[0] if parameter.dim() > 1 else 1
        bound = 0.01 * parameter.detach().reshape(units, -1).norm(dim=1).clamp(min=1e-3)
        now, was = parameter.grad.reshape(units, -1), before[key].reshape(units, -1)
        assert bool((now.norm(dim=1) <= bound * (1 + 1e-5)).all())
        below = was.norm(dim=1) < bound * (1 - 1e-5)
        assert torch.equal(now[below], was[below])  # bit for bit
        seen_small += int(below.sum())
        seen_clipped += int((was.norm(dim=1) > bound * (1 + 1e-5)).sum())
    assert seen_small > 0 and 0 < seen_clipped <= clipped


def test_gradients_that_are_not_finite_are_reported_and_nothing_is_changed() -> None:
    model = with_gradients(tiny())
    model.head.bias.grad[2] = float("nan")  # type: ignore[index]
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert int(adaptive_clip_grad_(model.named_parameters()).num_nonfinite) == 1
    after = [p.grad for p in model.parameters()]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_clipping_without_gradients_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gradient to clip"):
        adaptive_clip_grad_(tiny().named_parameters())


def test_the_update_equals_torch_sgd_with_nesterov_and_a_plain_average() -> None:
    ours, theirs = tiny(), tiny()
    a = SGD(param_groups.param_groups(ours, lr=0.1, weight_decay=1e-3), lr=0.1, ema_decay=0.9)
    b = torch.optim.SGD(
        param_groups.param_groups(theirs, lr=0.1, weight_decay=1e-3), lr=0.1, momentum=0.9, nesterov=True
    )
    average = [p.detach().clone() for p in theirs.parameters()]
    for t in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            with_gradients(model, 0.1 * (t + 1))
            optimizer.step()
        keep = min(0.9, (1 + t) / (10 + t))
        average = [keep * e + (1 - keep) * p.detach() for e, p in zip(average, theirs.parameters(), strict=True)]
    for p, q, e in zip(ours.parameters(), theirs.parameters(), average, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.state[p]["ema"], e, rtol=1e-5, atol=1e-6)


def test_the_schedule_at_its_corners() -> None:
    rate = [learning_rate(s, total_steps=100, warmup_steps=10, peak=2.0, final=0.5) for s in range(101)]
    assert (rate[0], rate[5], rate[10]) == (0.0, 1.0, 2.0)
    assert rate[55] == pytest.approx(1.25) and rate[100] == pytest.approx(0.5)
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert linear_scaling(0.1, 4096) == 1.6


def test_label_smoothing_spreads_its_share_over_all_classes() -> None:
    logits, labels = torch.randn(6, 10, dtype=torch.float64), torch.arange(6)
    targets = torch.full((6, 10), 0.01, dtype=torch.float64) + 0.9 * torch.eye(10, dtype=torch.float64)[:6]
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, labels, 0.1), expected.float())


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match="nfnet_f4"):
        nfnet.create_model("nfnet_f44")
    with pytest.raises(ValueError, match="drop_rate"):
        nfnet.create_model("nfnet_tiny", drop=0.1)


def test_dropped_branches_are_not_rescaled() -> None:
    layer = nfnet.layers.StochasticDepth(0.5).train()
    torch.manual_seed(0)
    out = layer(torch.ones(1, 2, 1, 1), torch.ones(64, 2, 3, 3))
    assert out.shape == (64, 2, 1, 1) and set(out.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(out[:, 0], out[:, 1])


def test_a_new_head_has_the_asked_size_and_the_rest_stays() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if not k.startswith("head."))
