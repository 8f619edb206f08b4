"""Laws of clipping, groups and the update that the networks alone do not show."""

import pytest
import torch
from torch import nn

from nfnet import kernels
from nfnet.optim import agc, param_groups
from nfnet.optim.losses import label_smoothing_cross_entropy
from nfnet.optim.sgd import SGD
from tests.nfnet import agc_reference


class Backbone(nn.Module):
    """Somebody else's network: normalised, a gain of four dimensions, and a head by the house's name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.gain = nn.Parameter(torch.ones(6, 1, 1, 1))
        self.head = nn.Linear(6, 4)


def with_gradients(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


# --- AGC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "units"), [((4, 3, 2, 2), 4), ((4, 3), 4), ((5,), 1), ((1,), 1), ((), 1)])
def test_a_unit_is_a_row_of_a_weight_and_the_whole_of_a_vector(shape: tuple[int, ...], units: int) -> None:
    sums = agc.square_sums([torch.full(shape, 2.0)])
    torch.testing.assert_close(sums, torch.full((units,), 4.0 * torch.ones(shape).numel() / units))


def test_without_kernels_the_sums_are_those_of_the_rows_in_the_tensors_order() -> None:
    tensors = [torch.randn(shape) for shape in ((4, 3, 2, 2), (5,), (3, 7), (), (2,), (6, 1, 1, 1))]
    with kernels.plain_only():
        sums, matrix = agc.square_sums(tensors), agc.square_sums(tensors[2:3])
    rows = [t.reshape(agc.num_units(t), -1).square().sum(1) for t in tensors]
    torch.testing.assert_close(sums, torch.cat(rows))
    torch.testing.assert_close(matrix, rows[2])
    factors = torch.arange(1.0, len(sums) + 1)
    for t, f, part in zip(tensors, agc.per_unit(factors, tensors), factors.split([len(r) for r in rows]), strict=True):
        torch.testing.assert_close((t * f).reshape(len(part), -1), t.reshape(len(part), -1) * part[:, None])


def test_clipping_without_a_gradient_is_an_error() -> None:
    with pytest.raises(ValueError, match="no gradient to clip"):
        agc.adaptive_clip_grad_(Backbone().named_parameters())


def test_the_factor_is_the_bound_over_the_norm() -> None:
    # By hand: |W| = 5 and |G| = 10 give 0.01 * 5 / 10; |W| = 0 is raised to eps; a small gradient is left alone.
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    gradient = torch.tensor([[6.0, 8.0], [6.0, 8.0], [0.03, 0.04]])
    factors = agc.coefficients(agc.square_sums([weight]), agc.square_sums([gradient]), 0.01, 1e-3)
    torch.testing.assert_close(factors, torch.tensor([5e-3, 1e-6, 1.0]))


def test_tiny_gradient_norms_are_raised_to_a_millionth() -> None:
    factor = agc.coefficients(torch.zeros(1), torch.tensor([1e-14]), 1e-5, 1e-3)  # bound 1e-8, norm 1e-7
    torch.testing.assert_close(factor, torch.tensor([1e-2]))


@pytest.mark.parametrize("cut", [1, 5, 9, 30])
def test_fragments_of_a_parameter_clip_as_the_whole(cut: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(4, 9, generator=generator) for _ in range(2))
    units = torch.arange(36) // 9
    squares = torch.zeros(2, 4)
    for part in (slice(0, cut), slice(cut, 36)):  # two ranks
        for i, tensor in enumerate((weight, gradient)):
            squares[i].index_add_(0, units[part], tensor.flatten()[part].square())
    found = agc.coefficients(*squares, 0.01, 1e-3)
    torch.testing.assert_close(found, agc_reference.factors(weight, gradient))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["conv.weight", "norm.bias", "head.weight"])
def test_one_gradient_that_is_not_finite_leaves_all_as_they_are(where: str, bad: float) -> None:
    model = with_gradients(Backbone())
    dict(model.named_parameters())[where].grad.view(-1)[0] = bad  # type: ignore[union-attr]
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    counts = agc.adaptive_clip_grad_(model.named_parameters())
    assert int(counts.num_nonfinite) == 1 and int(counts.num_clipped) == 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], rtol=0, atol=0, equal_nan=True)


def test_batched_clipping_equals_the_plain_loop_on_any_network() -> None:
    fast, plain = (with_gradients(Backbone()) for _ in range(2))
    plain.load_state_dict(fast.state_dict())
    counts = agc.adaptive_clip_grad_(fast.named_parameters())
    agc_reference.adaptive_clip_grad_(plain.named_parameters())
    for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-6, atol=0)
    # 6 filters, 6 units of the four-dimensional gain, and conv.bias, norm.weight, norm.bias, head.bias.
    assert int(counts.num_units) == 16


# --- groups -----------------------------------------------------------------------------------------------------------


def test_affine_vectors_and_gains_of_other_networks_are_not_decayed() -> None:
    rules = param_groups.assign(Backbone().named_parameters())
    assert {n for n, r in rules.items() if r.decay} == {"conv.weight", "head.weight"}


def test_a_parameter_that_matches_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(param_groups, "RULES", (*param_groups.RULES, param_groups.RULES[0]))
    with pytest.raises(ValueError, match=r"head\.weight matches 2 rules"):
        param_groups.assign(Backbone().named_parameters())


def test_frozen_parameters_are_in_no_group_and_the_head_has_its_own_rate() -> None:
    made = param_groups.param_groups(
        Backbone(), lr=0.5, weight_decay=0.1, head_lr_scale=10.0, frozen=("conv.", "norm.")
    )
    assert {g["name"]: g["param_names"] for g in made} == {
        "head weight": ["head.weight"],
        "head bias": ["head.bias"],
        "vectors": ["gain"],
    }
    assert [(g["lr"], g["lr_scale"], g["weight_decay"]) for g in made] == [
        (5.0, 10.0, 0.1),
        (5.0, 10.0, 0.0),
        (0.5, 1.0, 0.0),
    ]


@pytest.mark.parametrize(
    ("frozen", "message"), [(("stem.",), "no parameter's name"), (("",), "every parameter is frozen")]
)
def test_freezing_nothing_or_everything_is_an_error(frozen: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups.param_groups(Backbone(), lr=0.1, frozen=frozen)


# --- update -----------------------------------------------------------------------------------------------------------


def trained(*, updates: int = 4) -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model = Backbone()
    optimizer = SGD(param_groups.param_groups(model, lr=0.1, weight_decay=0.01), lr=0.1, ema_decay=0.99)
    for i in range(updates):
        with_gradients(model, seed=i)
        optimizer.step()
    return model, optimizer


def test_the_compiled_update_equals_the_batched_one() -> None:
    a, fast = trained()
    with kernels.plain_only():
        b, plain = trained()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        for key in ("momentum", "ema"):
            torch.testing.assert_close(fast.state[p][key], plain.state[q][key])


def test_the_update_leaves_gradients_as_they_are() -> None:
    model, _ = trained()
    expected = with_gradients(Backbone(), seed=3)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), expected.parameters(), strict=True))  # type: ignore[arg-type]


def test_one_flat_tensor_a_group_is_updated_as_its_parameters_are() -> None:
    weights = [torch.randn(3, 2), torch.randn(5)]
    flat = nn.Parameter(torch.cat([w.flatten() for w in weights]))
    parts = [nn.Parameter(w.clone()) for w in weights]
    options = {"lr": 0.1, "weight_decay": 0.01, "ema_decay": 0.9}
    whole, split = SGD([flat], **options), SGD(parts, **options)
    for _ in range(3):
        flat.grad = torch.randn(11)
        parts[0].grad, parts[1].grad = flat.grad[:6].view(3, 2), flat.grad[6:]
        whole.step()
        split.step()
    assert torch.equal(flat.detach(), torch.cat([p.detach().flatten() for p in parts]))
    assert torch.equal(whole.state[flat]["ema"], torch.cat([split.state[p]["ema"].flatten() for p in parts]))


def test_the_average_of_the_first_update_is_a_tenth_of_the_start() -> None:
    # min(decay, (1 + 0) / (10 + 0)) = 0.1; one update of rate 1 and gradient 1 with Nesterov 0.9 moves 0 to -1.9.
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=1.0, ema_decay=0.99999)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == pytest.approx(-1.9)
    assert optimizer.state[weight]["ema"].item() == pytest.approx(0.9 * -1.9)


def test_the_update_goes_on_from_its_saved_state() -> None:
    (straight, _), (model, optimizer) = trained(), trained(updates=2)
    again = SGD(param_groups.param_groups(model, lr=0.1, weight_decay=0.01), lr=0.1, ema_decay=0.99)
    again.load_state_dict(optimizer.state_dict())
    for i in (2, 3):
        with_gradients(model, seed=i)
        again.step()
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), model.parameters(), strict=True))
    assert [g["num_updates"] for g in again.param_groups] == [4] * len(again.param_groups)


# --- loss -------------------------------------------------------------------------------------------------------------


def test_classes_and_their_one_hot_targets_cost_the_same_in_fp32() -> None:
    logits, labels = torch.randn(5, 7).bfloat16(), torch.arange(5)
    one_hot = nn.functional.one_hot(labels, 7).bfloat16()
    a, b = (label_smoothing_cross_entropy(logits, t, 0.1, reduction="none") for t in (labels, one_hot))
    assert a.dtype == torch.float32 and a.shape == (5,)
    torch.testing.assert_close(a, b)


def test_a_parameter_without_gradient_is_passed_over() -> None:
    model = with_gradients(Backbone())
    model.norm.bias.grad = None  # type: ignore[union-attr]
    counts = agc.adaptive_clip_grad_(model.named_parameters())
    assert int(counts.num_units) == sum(n for _, n in counts.groups.values()) and model.norm.bias.grad is None  # type: ignore[union-attr]


@pytest.mark.parametrize("factors", [None, torch.tensor([0.5, 1.0, 0.25])])
def test_without_kernels_the_update_is_its_formula(factors: torch.Tensor | None) -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = SGD([weight], lr=0.3, momentum=0.8, weight_decay=0.1, ema_decay=0.9)
    w, v = weight.detach().clone(), torch.zeros(3, 4)
    ema = w.clone()
    for t in range(2):
        weight.grad = torch.randn(3, 4)
        optimizer.factors = None if factors is None else [factors]
        g = (1.0 if factors is None else factors[:, None]) * weight.grad + 0.1 * w
        v = 0.8 * v + g
        w = w - 0.3 * (g + 0.8 * v)
        ema = ema + (1 - min(0.9, (1 + t) / (10 + t))) * (w - ema)
        with kernels.plain_only():
            optimizer.step()
    torch.testing.assert_close(weight.detach(), w)
    torch.testing.assert_close(optimizer.state[weight]["momentum"], v)
    torch.testing.assert_close(optimizer.state[weight]["ema"], ema)


def test_settings_and_factors_that_cannot_be_are_errors() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    assert SGD(weights, lr=0.0).param_groups[0]["num_updates"] == 0
    for wrong in ({"lr": -0.1}, {"lr": 0.1, "momentum": 1.0}, {"lr": 0.1, "momentum": -0.1}):
        with pytest.raises(ValueError, match="set "):
            SGD(weights, **wrong)  # type: ignore[arg-type]
    optimizer = SGD(weights, lr=0.1)
    weights[0].grad, optimizer.factors = torch.ones(2), [torch.ones(2)]
    with pytest.raises(ValueError, match="have no gradient"):
        optimizer.step()


def test_a_weight_of_zero_is_clipped_as_one_of_norm_a_thousandth() -> None:
    """eps of Brock et al. 2021, section 4."""
    factor = agc.coefficients(torch.zeros(1), torch.full((1,), 4.0), 0.02)
    assert float(factor) == pytest.approx(0.02 * 1e-3 / 2.0)
