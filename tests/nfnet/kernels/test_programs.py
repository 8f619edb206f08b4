"""Kernel against plain: on a GPU where there is one, else in Triton's interpreter (started by test_interpreter.py)."""

import os
from itertools import chain

import pytest
import torch

from nfnet.kernels import reference, triton_layers
from nfnet.kernels.reference import Rates
from nfnet.optim.agc import coefficients

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1",
        reason="no GPU here; test_interpreter.py runs these on the CPU, in Triton's interpreter",
    ),
    # The interpreter's NumPy says so where a sigmoid's exponential is infinite, and the sigmoid rightly 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
FORMATS = [torch.contiguous_format, torch.channels_last]
HALF = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""One rounding to the type, so that two fp32 results on either side of a boundary still agree."""


def close(ours: torch.Tensor, plain: torch.Tensor, *, rtol: float = 2e-5, atol: float = 1e-6) -> None:
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    assert ours.numel() < 2 or ours.stride() == plain.stride()
    torch.testing.assert_close(ours, plain, rtol=max(rtol, HALF.get(plain.dtype, 0)), atol=atol)


def weight_and_gain(shape: tuple[int, ...], layout: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    weight = (torch.randn(shape) * 0.05 + 0.3).to(DEVICE, memory_format=layout)
    weight[0] = 0.3 + 1e-5 * torch.randn(shape[1:], device=DEVICE)  # under the floor
    return weight, torch.rand(shape[0], device=DEVICE) + 0.5


# (5, 130, 5, 5): more than one pass of a block; (6, 1, 3, 3), (3, 40, 1, 1): both layouts at once.
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (6, 1, 3, 3), (3, 40, 1, 1), (5, 130, 5, 5)], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_standardisation(
    shape: tuple[int, ...], layout: torch.memory_format, written: torch.memory_format, eps: float | None
) -> None:
    weight, gain = weight_and_gain(shape, layout)
    # Half the output types with each layout: types and layouts are independent in the program.
    out_dtype = torch.bfloat16 if layout == written else torch.float16 if eps else torch.float32
    ours = triton_layers.standardise(weight, gain, 1e-4, eps, out_dtype=out_dtype, memory_format=written)
    plain = reference.standardise(weight, gain, 1e-4, eps, out_dtype=out_dtype, memory_format=written)
    close(ours.out, plain.out, atol=1e-5)
    for a, b in zip(ours[1:3], plain[1:3], strict=True):
        close(a, b)
    assert ours.floored.tolist() == plain.floored.tolist() == [eps is None] + [False] * (shape[0] - 1)
    grad = torch.randn(shape, device=DEVICE).to(out_dtype, memory_format=written)
    results = triton_layers.standardise_backward(grad, weight, gain, *ours[1:])
    for a, b in zip(results, reference.standardise_backward(grad, weight, gain, *plain[1:]), strict=True):
        close(a, b, rtol=2e-4, atol=2e-4 * float(b.abs().max()))


def test_standardisation_takes_a_gradient_of_any_strides() -> None:
    weight, gain = weight_and_gain((4, 6, 3, 3), torch.contiguous_format)
    found = triton_layers.standardise(weight, gain)
    for grad in (torch.ones((), device=DEVICE).expand(4, 6, 3, 3), torch.randn(4, 6, 6, 3, device=DEVICE)[:, :, ::2]):
        ours = triton_layers.standardise_backward(grad, weight, gain, *found[1:])
        for a, b in zip(ours, reference.standardise_backward(grad, weight, gain, *found[1:]), strict=True):
            close(a, b, rtol=1e-3, atol=1e-4)


def test_a_gradient_that_is_given_away_becomes_the_result() -> None:
    weight, gain = weight_and_gain((4, 300, 3, 3), torch.channels_last)
    found = triton_layers.standardise(weight, gain)
    grad = torch.randn_like(weight)
    expected = triton_layers.standardise_backward(grad, weight, gain, *found[1:])
    ours = triton_layers.standardise_backward(grad, weight, gain, *found[1:], in_place=True)
    assert ours[0] is grad
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    turned = torch.randn(weight.shape, device=DEVICE)
    assert triton_layers.standardise_backward(turned, weight, gain, *found[1:], in_place=True)[0] is not turned


def test_a_weight_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous or channels-last"):
        triton_layers.standardise(torch.randn(4, 6, 3, 6, device=DEVICE)[..., ::2], torch.ones(4, device=DEVICE))


def test_float64_is_refused_and_not_rounded() -> None:
    with pytest.raises(ValueError, match="float64"):
        triton_layers.scaled_activation(torch.randn(4, dtype=torch.float64, device=DEVICE), "relu", 1.0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations(name: str, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 5, 9, 13) * 4).to(DEVICE, dtype, memory_format=torch.channels_last)
    x[0, 0, 0, :4] = torch.tensor([-80.0, 80.0, 0.0, 1e-3])
    grad = torch.randn(x.shape, device=DEVICE).to(dtype)  # in the other layout
    for before, factor in ((1.0, 1.7), (0.8, 0.3)):
        close(
            triton_layers.scaled_activation(x, name, factor, before),
            reference.scaled_activation(x, name, factor, before),
        )
        ours = triton_layers.scaled_activation_backward(grad, x, name, factor, before)
        close(ours, reference.scaled_activation_backward(grad, x, name, factor, before))


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_pass_nan_on_and_take_what_has_gaps_or_nothing(name: str) -> None:
    assert triton_layers.scaled_activation(torch.full((3,), float("nan"), device=DEVICE), name, 1.0).isnan().all()
    sliced = torch.randn(6, 7, device=DEVICE)[::2, ::3]
    torch.testing.assert_close(
        triton_layers.scaled_activation(sliced, name, 1.5), reference.scaled_activation(sliced, name, 1.5)
    )
    assert triton_layers.scaled_activation(torch.empty(0, 3, device=DEVICE), name, 1.0).shape == (0, 3)
    with pytest.raises(ValueError, match="no fused activation"):
        triton_layers.scaled_activation(sliced, "swoosh", 1.0)


SHAPES = [(7, 5, 3, 3), (40, 27), (3, 600), (33,), (1,), (), (2, 8, 1, 1), (20000,), (18, 130, 3, 3)]


def group(layout: torch.memory_format, dtype: torch.dtype) -> tuple[list[torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(1)

    def made(scale: float) -> list[torch.Tensor]:
        tensors = [torch.randn(s, generator=generator) * scale for s in SHAPES]
        return [t.to(DEVICE, memory_format=layout) if t.dim() == 4 else t.to(DEVICE) for t in tensors]

    # Some units above their bound and some below: the second tensor's gradients are tiny.
    grads = [g.to(dtype) * (1e-4 if i == 1 else 1) for i, g in enumerate(made(0.02))]
    return made(1.0), grads, made(0.1), made(1.0)


SETTINGS = Rates(lr=0.1, momentum=0.9, weight_decay=1e-2, keep=0.999)


def factors_of(params: list[torch.Tensor], grads: list[torch.Tensor]) -> torch.Tensor:
    found = coefficients(reference.square_sums(params), reference.square_sums(grads), 0.01)
    assert 0 < int((found < 1).sum()) < len(found)
    return found


@pytest.mark.parametrize(
    "layout, dtype, is_clipped, average",
    [
        (torch.contiguous_format, torch.float32, True, True),
        (torch.channels_last, torch.bfloat16, True, True),
        (torch.contiguous_format, torch.float16, False, False),
        (torch.channels_last, torch.float32, True, False),
    ],
)
def test_the_update(layout: torch.memory_format, dtype: torch.dtype, is_clipped: bool, average: bool) -> None:
    results = []
    for kernels in (triton_layers, reference):
        params, grads, momenta, averages = group(layout, dtype)
        lists = (params, grads, momenta, averages if average else [])
        for _ in range(2):  # the second time with cached tables
            factors = factors_of(params, grads) if is_clipped else None
            kernels.update_(*lists, SETTINGS, factors=factors)
        results.append(lists)
    for a, b in zip(chain(*results[0]), chain(*results[1]), strict=True):
        close(a, b, rtol=1e-5, atol=1e-6)


def test_an_update_counts_as_a_write_in_place() -> None:
    params, grads, momenta, averages = group(torch.contiguous_format, torch.float32)
    before = [t._version for t in (*params, *momenta, *averages)]
    triton_layers.update_(params, grads, momenta, averages, SETTINGS)
    after = [t._version for t in (*params, *momenta, *averages)]
    assert all(a > b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_squares_in_any_layout(dtype: torch.dtype) -> None:
    _, grads, _, _ = group(torch.contiguous_format, dtype)
    turned = [g.to(memory_format=torch.channels_last) if g.dim() == 4 else g for g in grads]
    for given in (grads, turned):
        close(triton_layers.square_sums(given), reference.square_sums(given))


def test_new_addresses_are_seen() -> None:
    """Gradients allocated anew after a cached table: the old memory must not be read."""
    _, grads, _, _ = group(torch.contiguous_format, torch.float32)
    triton_layers.square_sums(grads)
    moved = [g.clone() * 3 for g in grads]
    for g in grads:
        g.fill_(float("nan"))
    close(triton_layers.square_sums(moved), reference.square_sums(moved))


def test_tensors_that_moved_or_changed_their_layout_are_seen() -> None:
    """The same Parameter objects over other memory, as model.to(memory_format=...) leaves them."""
    params, grads, momenta, averages = group(torch.contiguous_format, torch.float32)
    triton_layers.update_(params, grads, momenta, averages, SETTINGS)
    for lists in (params, momenta, averages):
        for t in lists:
            if t.dim() == 4:
                t.data = t.data.to(memory_format=torch.channels_last)
    copies = [[t.clone() for t in lists] for lists in (params, grads, momenta, averages)]
    factors = factors_of(params, grads)
    triton_layers.update_(params, grads, momenta, averages, SETTINGS, factors=factors)
    reference.update_(*copies, SETTINGS, factors=factors)
    for a, b in zip(params, copies[0], strict=True):
        close(a, b, rtol=1e-5)


def test_unaligned_tensors_are_read_right() -> None:
    params, grads, momenta, averages = group(torch.contiguous_format, torch.float32)
    lists = []
    for tensors in (params, grads, momenta, averages):
        flat = torch.zeros(sum(t.numel() for t in tensors) + 1, device=DEVICE)[1:]
        views = [v.view(t.shape) for v, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
        torch._foreach_copy_(views, tensors)
        lists.append(views)
    factors = factors_of(params, grads)
    triton_layers.update_(*lists, SETTINGS, factors=factors)
    reference.update_(params, grads, momenta, averages, SETTINGS, factors=factors)
    for a, b in zip(lists[0], params, strict=True):
        close(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda p, g, m, e: m.__setitem__(0, m[0].to(memory_format=torch.channels_last)), "momentum of a parameter"),
        (lambda p, g, m, e: e.__setitem__(1, e[1].bfloat16()), "average of a parameter"),
        (lambda p, g, m, e: g.__setitem__(1, g[1].bfloat16()), "one of fp32, bf16 and fp16 for all"),
        (lambda p, g, m, e: p.__setitem__(1, p[1].bfloat16()), "fp32 parameters"),
        (lambda p, g, m, e: g.pop(), "9 parameters and 8 gradients"),
        (lambda p, g, m, e: m.pop(), "9 parameters and 8 momentum tensors"),
        (lambda p, g, m, e: g.__setitem__(1, g[1][:5]), "pair them anew"),
        (lambda p, g, m, e: [t.clear() for t in (p, g, m, e)], "no parameter"),
        (lambda p, g, m, e: p.__setitem__(2, torch.zeros(3, 1200, device=DEVICE)[:, ::2]), "make it contiguous"),
    ],
)
def test_what_the_tables_cannot_express_is_refused(spoil: object, sentence: str) -> None:
    lists = group(torch.contiguous_format, torch.float32)
    spoil(*lists)  # type: ignore[operator]
    with pytest.raises(ValueError, match=sentence):
        triton_layers.update_(*lists, SETTINGS)
