"""The reference kernels against what they stand for: autograd of the formulas, the paper's clipping, torch's SGD."""

import pytest
import torch
from torch.nn import functional as F

from nfnet.kernels import reference
from nfnet.layers import Standardisation, WSConv2d
from nfnet.optim.agc import coefficients
from tests.nfnet import agc_reference


class Standardise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, gain, floor, eps):
        found = reference.standardise(weight, gain, floor, eps)
        ctx.save_for_backward(weight, gain, found.mean, found.rstd, found.floored)
        return found.out

    @staticmethod
    def backward(ctx, grad):
        return *reference.standardise_backward(grad, *ctx.saved_tensors), None, None


@pytest.mark.parametrize("floor, eps", [(1e-4, None), (1e-4, 1e-2), (1e9, None)], ids=["variance", "eps", "floored"])
def test_standardising_has_the_derivative_that_finite_differences_find(floor: float, eps: float | None) -> None:
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, g: Standardise.apply(w, g, floor, eps), (weight, gain))


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_standardising_is_the_convolutions_own_with_its_gradients(
    eps: float | None, layout: torch.memory_format
) -> None:
    conv = WSConv2d(6, 8, 3, form=Standardisation(eps)).to(memory_format=layout)
    with torch.no_grad():
        conv.weight[0] *= 1e-4  # a unit under the floor
        conv.gain.uniform_(0.5, 2)
    grad = torch.randn(8, 6, 3, 3)
    out = conv.standardised_weight()
    expected = torch.autograd.grad(out, (conv.weight, conv.gain), grad)
    found = reference.standardise(conv.weight, conv.gain, conv.FLOOR, eps)
    torch.testing.assert_close(found.out, out)
    assert found.out.stride() == conv.weight.stride()
    assert found.floored.tolist() == [eps is None] + [False] * 7
    grads = reference.standardise_backward(grad, conv.weight, conv.gain, *found[1:])
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("before", [1.0, 0.7])
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_are_torchs_with_their_gradients(name: str, before: float) -> None:
    function = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "gelu_erf": F.gelu, "silu": F.silu, "relu": F.relu}[
        name
    ]
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64, requires_grad=True)
    expected = function(x * before) * 1.7
    torch.testing.assert_close(reference.scaled_activation(x, name, 1.7, before), expected)
    grad = torch.randn(1001, dtype=torch.float64)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(reference.scaled_activation_backward(grad, x.detach(), name, 1.7, before), theirs)


def _network() -> list[tuple[str, torch.nn.Parameter]]:
    shapes = {"a.weight": (5, 4, 3, 3), "a.gain": (5,), "skip_gain": (1,), "b.weight": (7, 6), "c.weight": (4, 1, 3, 3)}
    return [(n, torch.nn.Parameter(torch.randn(s))) for n, s in shapes.items()]


@pytest.mark.parametrize("average", [True, False])
def test_the_update_with_factors_is_clipping_then_torchs_sgd(average: bool) -> None:
    named = _network()
    ours = [p.detach().clone() for _, p in named]
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.1, weight_decay=1e-2, momentum=0.9, nesterov=True)
    momenta, averages = [torch.zeros_like(w) for w in ours], [w.clone() for w in ours] if average else []
    expected = [w.clone() for w in ours]
    for _ in range(3):
        for _, p in named:
            p.grad = torch.randn_like(p) * 0.02
        grads = [p.grad.clone() for _, p in named]  # type: ignore[union-attr]
        factors = coefficients(reference.square_sums(ours), reference.square_sums(grads), 0.01)
        assert int((factors < 1).sum()) > 0
        rates = reference.Rates(lr=0.1, momentum=0.9, weight_decay=1e-2, keep=0.9)
        reference.update_(ours, grads, momenta, averages, rates, factors)
        agc_reference.adaptive_clip_grad_(named, 0.01)
        optimizer.step()
        expected = [0.9 * e + 0.1 * p.detach() for e, (_, p) in zip(expected, named, strict=True)]
    torch.testing.assert_close(ours, [p.detach() for _, p in named])
    torch.testing.assert_close(momenta, [optimizer.state[p]["momentum_buffer"] for _, p in named])
    if average:
        torch.testing.assert_close(averages, expected)
