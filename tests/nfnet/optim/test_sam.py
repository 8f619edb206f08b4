"""SAM against its formula: in closed form on a quadratic, and written out plainly in float64 on networks."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import nfnet
from nfnet.optim.agc import adaptive_clip_grad_
from nfnet.optim.sam import sam_backward


def tiny(**options: object) -> nfnet.NFNet:
    torch.manual_seed(0)
    return nfnet.create_model("nfnet_tiny", num_classes=5, skip_init=1.0, **options)


def loss_of(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda images, labels: F.cross_entropy(model(images), labels)


def batch(size: int = 4, px: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, px, px, generator=generator), torch.arange(size) % 5


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


class Small(nn.Module):
    """Two layers in float64, whose gradients `plain_sam` writes out by hand with NumPy."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(3, 6, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.a.T) @ self.b.T


def plain_gradient(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of mean_n sum_k (tanh(x a^T) b^T - y)^2 / 2, by the chain rule."""
    hidden = np.tanh(x @ a.T)
    error = (hidden @ b.T - y) / len(x)
    return ((error @ b) * (1 - hidden**2)).T @ x, error.T @ hidden


def plain_sam(
    a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray, rho: float, seen: int
) -> tuple[np.ndarray, np.ndarray]:
    ga, gb = plain_gradient(a, b, x[:seen], y[:seen])
    norm = np.sqrt((ga**2).sum() + (gb**2).sum())
    return plain_gradient(a + rho * ga / norm, b + rho * gb / norm, x, y)


def squared(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda x, y: (model(x) - y).square().sum(1).mean() / 2


def regression(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: torch.randn(size, n, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(4), draw(3)


@pytest.mark.parametrize(("share", "seen"), [(1.0, 10), (0.2, 2), (0.01, 1)])
def test_the_gradient_is_the_one_written_out_by_hand(share: float, seen: int) -> None:
    model = Small()
    x, y = regression(10)
    report = sam_backward(model, squared(model), x, y, rho=0.3, share=share)
    a, b = model.a.detach().numpy(), model.b.detach().numpy()
    for ours, plain in zip(gradients(model), plain_sam(a, b, x.numpy(), y.numpy(), 0.3, seen), strict=True):
        np.testing.assert_allclose(ours.numpy(), plain, rtol=1e-12, atol=1e-14)
    first = plain_gradient(a, b, x.numpy()[:seen], y.numpy()[:seen])
    assert float(report.ascent_norm) == pytest.approx(np.sqrt(sum((g**2).sum() for g in first)))


def test_accumulation_is_the_mean_of_each_micro_batchs_own_sam_gradient() -> None:
    model = Small()
    x, y = regression(12)
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        sam_backward(model, squared(model), x[rows], y[rows], rho=0.3, share=0.5, scale=1 / 3)
    a, b = model.a.detach().numpy(), model.b.detach().numpy()
    parts = [plain_sam(a, b, x.numpy()[i : i + 4], y.numpy()[i : i + 4], 0.3, 2) for i in (0, 4, 8)]
    for ours, plain in zip(gradients(model), zip(*parts, strict=True), strict=True):
        np.testing.assert_allclose(ours.numpy(), sum(plain) / 3, rtol=1e-12, atol=1e-14)


def test_on_a_quadratic_the_answer_is_known() -> None:
    # L = w^T diag(1, 4) w / 2 at w = (3, 1): g = (3, 4), |g| = 5, so at rho = 0.5 the gradient is A (w + 0.1 g).
    model = nn.ParameterList([nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([1.0]))])
    objective = lambda images, labels: (model[0] ** 2 + 4 * model[1] ** 2).sum() / 2  # noqa: E731
    report = sam_backward(model, objective, torch.zeros(2, 1), torch.zeros(2), rho=0.5)
    assert [float(g) for g in gradients(model)] == pytest.approx([3.3, 4 * 1.4])
    assert float(report.ascent_norm) == 5.0 and float(report.ascent_loss) == 6.5


def test_the_weights_are_restored_bit_for_bit() -> None:
    # Values at which (w + e) - e loses w: tiny next to e, huge, and a negative zero.
    model = tiny()
    with torch.no_grad():
        model.head.weight.view(-1)[:4] = torch.tensor([1e-30, 3e7, -0.0, 1e-8])  # type: ignore[union-attr]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    places = [p.data_ptr() for p in model.parameters()]
    sam_backward(model, loss_of(model), *batch(), rho=0.7)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name
    assert [p.data_ptr() for p in model.parameters()] == places


def test_an_error_in_the_second_pass_leaves_the_weights_restored() -> None:
    model = Small()
    before = copy.deepcopy(model.state_dict())

    def fail(loss: torch.Tensor) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        sam_backward(model, squared(model), *regression(4), rho=0.3, backward=fail)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_rho_zero_it_is_the_plain_gradient_and_the_plain_random_state(checkpointing: bool) -> None:
    ours, plain = (tiny(stochastic_depth=0.5, drop_rate=0.3).train() for _ in range(2))
    ours.set_grad_checkpointing(checkpointing)
    torch.manual_seed(3)
    sam_backward(ours, loss_of(ours), *batch(), rho=0.0)
    after_ours = torch.rand(1)
    torch.manual_seed(3)
    loss_of(plain)(*batch()).backward()
    assert after_ours == torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(plain), strict=True))


def test_both_passes_drop_the_same_and_leave_the_random_state_of_one_pass() -> None:
    model = tiny(stochastic_depth=0.5, drop_rate=0.3).train()
    images, labels = batch()
    seen: list[torch.Tensor] = []
    objective = loss_of(model)

    def recorded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(torch.rand(8))
        return objective(x, y)

    torch.manual_seed(3)
    report = sam_backward(model, recorded, images, labels, rho=1e-9)
    after = torch.rand(1)
    assert torch.equal(seen[0], seen[1])
    assert float(report.loss) == pytest.approx(float(report.ascent_loss), abs=1e-5)
    torch.manual_seed(3)
    recorded(images, labels)
    assert torch.equal(after, torch.rand(1))


def test_the_first_gradient_never_reaches_grad_or_its_hooks() -> None:
    model = Small()
    arrived = []
    model.a.register_post_accumulate_grad_hook(lambda p: arrived.append(p.grad.clone()))
    sam_backward(model, squared(model), *regression(6), rho=0.3)
    assert len(arrived) == 1 and torch.equal(arrived[0], model.a.grad)  # type: ignore[arg-type]


def test_frozen_parameters_are_not_perturbed() -> None:
    model, (x, y) = Small(), regression(6)
    model.a.requires_grad_(False)
    seen = []
    objective = squared(model)
    sam_backward(model, lambda *p: (seen.append(model.a.clone()), objective(*p))[1], x, y, rho=0.3)
    assert model.a.grad is None and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_ascent_that_is_not_finite_perturbs_nothing_and_says_so(poison: float) -> None:
    model, (x, y) = Small(), regression(6)
    x[0, 0] = poison
    seen = []
    objective = squared(model)
    report = sam_backward(model, lambda *p: (seen.append(model.b.detach().clone()), objective(*p))[1], x, y, rho=0.3)
    assert not bool(report.ascent_norm.isfinite())
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], model.b.detach())


def test_a_gradient_of_zero_perturbs_nothing() -> None:
    model = Small()
    report = sam_backward(model, lambda x, y: 0 * squared(model)(x, y), *regression(4))
    assert float(report.ascent_norm) == 0 and all(not g.any() for g in gradients(model))


def test_clipping_sees_the_second_gradient_only() -> None:
    ours, by_hand = tiny(), tiny()
    images, labels = batch()
    sam_backward(ours, loss_of(ours), images, labels, rho=0.5)
    adaptive_clip_grad_(ours.named_parameters())
    # The same by hand: a moved copy's gradient, clipped by the bounds of the weights that were not moved.
    moved = copy.deepcopy(by_hand)
    grads = torch.autograd.grad(loss_of(by_hand)(images, labels), list(by_hand.parameters()))
    norm = torch.cat([g.reshape(-1) for g in grads]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(moved.parameters(), grads, strict=True):
            parameter += 0.5 * gradient / norm
    loss_of(moved)(images, labels).backward()
    for parameter, other in zip(by_hand.parameters(), moved.parameters(), strict=True):
        parameter.grad = other.grad
    adaptive_clip_grad_(by_hand.named_parameters())
    for a, b in zip(gradients(ours), gradients(by_hand), strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())


def test_nothing_waits_for_the_device() -> None:
    # A fake tensor has no value: reading one on the host raises.
    with FakeTensorMode():
        model = Small()
        report = sam_backward(model, squared(model), torch.randn(6, 4).double(), torch.randn(6, 3).double(), rho=0.3)
        assert report.loss.shape == () and model.a.grad is not None
        with pytest.raises(RuntimeError):
            report.ascent_norm.item()


@pytest.mark.parametrize(
    ("options", "message"), [({"rho": -1.0}, "rho"), ({"rho": float("nan")}, "rho"), ({"share": 0.0}, "share")]
)
def test_wrong_settings_are_refused(options: dict[str, float], message: str) -> None:
    model = Small()
    with pytest.raises(ValueError, match=message):
        sam_backward(model, squared(model), *regression(4), **options)


def test_a_loss_without_parameters_is_refused() -> None:
    model = Small()
    other = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="no trainable parameter"):
        sam_backward(model, lambda x, y: other * x.sum(), *regression(4))
    with pytest.raises(ValueError, match="no images"):
        sam_backward(model, squared(model), *regression(0))
