"""The compiled loops compute what the reference does, whatever the layout, the precision and the number of threads."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from nfnet import functional, kernels
from nfnet.kernels import cpu, reference
from nfnet.layers import GAMMA, ScaledActivation, SqueezeExcite, Standardisation, WSConv2d
from nfnet.optim.agc import coefficients, square_sums
from nfnet.optim.sgd import SGD

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def test_the_loops_were_compiled_where_there_is_a_compiler() -> None:
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("there is no C compiler on this machine; plain torch serves")
    assert cpu.problem == ""


def test_a_compiled_library_of_another_version_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler on this machine")
    for number, text in enumerate(("int nf_interface(void) { return -1; }", "int old;")):
        (tmp_path / "old.c").write_text(text)
        library = tmp_path / f"{number}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "old.c"], check=True)
        spec = importlib.util.spec_from_file_location("old", library)
        monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name, spec=spec: spec)
        found, problem = cpu._load()
        assert found is None and "another version" in problem and "install normfree again" in problem


def test_the_interface_s_number_is_raised_with_the_compiled_functions_arguments() -> None:
    text = Path(cpu.__file__).with_name("native.c").read_text()
    exported = [" ".join(found.split()) for found in re.findall(r"^EXPORT ([^{]*)", text, re.MULTILINE)]
    digest = hashlib.sha256("\n".join(exported).encode()).hexdigest()[:12]
    assert re.findall(r"nf_interface\(void\) \{ return (\d+)", text) == [str(cpu.INTERFACE)]
    assert (cpu.INTERFACE, digest) == (2, "fdf973b80d72"), "raise both numbers and enter the new digest here"


@pytest.fixture(autouse=True)
def _needs_loops(request: pytest.FixtureRequest) -> Iterator[None]:
    if cpu.problem and "compiled" not in request.node.name:
        pytest.skip(cpu.problem)
    yield


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float(
        (ours.detach().double() - exact.detach().double()).abs().max()
        / exact.detach().double().abs().max().clamp(min=1e-12)
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("added_eps", [None, 1e-5])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (16, 128, 1, 1), (7, 33, 3, 3), (1, 1, 1, 1)])
def test_standardisation_and_its_derivative_equal_the_formula(
    shape: tuple[int, ...], added_eps: float | None, form: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 0.1 + 0.3
    weight[0] *= 1e-4  # below the floor
    gain, grad = torch.randn(shape[0], generator=generator), torch.randn(shape, generator=generator)
    weight = weight.contiguous(memory_format=FORMATS[form])
    ours = cpu.standardise(weight, gain, added_eps=added_eps)
    exact = reference.standardise(weight.double(), gain.double(), added_eps=added_eps)
    assert torch.equal(ours.floored, exact.floored) and ours.out.stride() == weight.stride()
    assert relative(ours.out, exact.out) < 2e-6
    found = cpu.standardise_backward(grad, weight, gain, *ours[1:])
    wanted = reference.standardise_backward(grad.double(), weight.double(), gain.double(), *exact[1:])
    assert all(relative(a, b) < 2e-5 for a, b in zip(found, wanted, strict=True))
    half = cpu.standardise(weight, gain, added_eps=added_eps, out_dtype=torch.bfloat16).out
    assert torch.equal(half, ours.out.bfloat16())


@pytest.mark.parametrize("before", [1.0, 0.7])
@pytest.mark.parametrize("name", sorted(cpu.KINDS))
def test_activations_and_their_slopes_equal_the_formula(name: str, before: float) -> None:
    x = torch.cat([torch.linspace(-30, 30, 40_003), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4, 88.0, -88.0])])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    wanted = reference.scaled_activation(x.double(), name, 1.7, before)
    torch.testing.assert_close(cpu.scaled_activation(x, name, 1.7, before).double(), wanted, rtol=1e-6, atol=1e-7)
    slopes = reference.scaled_activation_backward(grad.double(), x.double(), name, 1.7, before)
    found = cpu.scaled_activation_backward(grad, x, name, 1.7, before).double()
    torch.testing.assert_close(found, slopes, rtol=2e-6, atol=2e-6)
    half = cpu.scaled_activation(x.bfloat16(), name, 1.7, before)
    rounded = reference.scaled_activation(x.bfloat16(), name, 1.7, before)
    torch.testing.assert_close(half, rounded, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", sorted(cpu.KINDS))
def test_what_is_not_finite_stays_so(name: str) -> None:
    x = torch.tensor([float("nan"), float("inf")])
    assert torch.equal(cpu.scaled_activation(x, name, 1.0).isnan(), torch.tensor([True, False]))
    assert cpu.scaled_activation(x.bfloat16(), name, 1.0)[0].isnan()


CONVS = {
    "1x1 of few pixels": (1, 1, 1, 4),
    "1x1 of many pixels": (1, 1, 1, 20),
    "3x3 grouped": (3, 1, 4, 9),
    "3x3 strided": (3, 2, 1, 9),
    "7x7 strided": (7, 2, 1, 17),
}


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_and_its_gradients_equal_plain_torch(case: str, form: str, weights: str) -> None:
    kernel, stride, groups, px = CONVS[case]
    torch.manual_seed(0)
    conv = WSConv2d(16, 24, kernel, stride=stride, groups=groups).to(memory_format=FORMATS[weights])
    nn.init.normal_(conv.gain), nn.init.normal_(conv.bias)
    x = torch.randn(2, 16, px, px).contiguous(memory_format=FORMATS[form]).requires_grad_()

    def run() -> list[torch.Tensor]:
        out = conv(x)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return [out, *torch.autograd.grad(out, [x, *conv.parameters()], grad)]

    ours = run()
    with kernels.plain_only():
        wanted = run()
    assert ours[0].is_contiguous(memory_format=FORMATS[form]) or "contiguous" in (form, weights)  # oneDNN may choose
    assert all(relative(a, b) < 5e-6 for a, b in zip(ours, wanted, strict=True))
    assert cpu.can_update([conv.weight.detach()], [ours[2]])  # one layout: the fused update takes them


def test_in_half_precision_any_two_layouts_give_the_same_gradient() -> None:
    torch.manual_seed(0)
    conv, x = WSConv2d(16, 24, 3), torch.randn(2, 16, 9, 9)
    grads = []
    for last in (False, True):
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = conv(x.contiguous(memory_format=torch.channels_last) if last else x)
        out.float().square().sum().backward()
        grads.append(conv.weight.grad)
    assert relative(grads[1], grads[0]) < 2e-2


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("case", [name for name in CONVS if name.startswith("1x1")] + ["3x3"])
def test_in_half_precision_a_convolution_s_gradients_are_no_further_off_than_plain_torch_s(
    case: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "multiplies_bf16", lambda: native)
    px = CONVS[case][3] if case in CONVS else 9
    torch.manual_seed(0)
    conv = WSConv2d(32, 24, int(case[0]))
    nn.init.normal_(conv.bias)
    x = torch.randn(4, 32, px, px).contiguous(memory_format=torch.channels_last).requires_grad_()

    def gradients(precision: str) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = conv(x)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return list(torch.autograd.grad(out, [x, *conv.parameters()], grad.to(out.dtype)))

    exact, ours = gradients("fp32"), gradients("bf16")
    with kernels.plain_only():
        plain = gradients("bf16")
    for a, b, e in zip(ours, plain, exact, strict=True):
        assert a.dtype == torch.float32 and relative(a, e) <= max(1.5 * relative(b, e), 2**-8)


@pytest.mark.parametrize("dtype", cpu.HALF)
def test_a_scaled_branch_and_its_gradients_equal_plain_torch(dtype: torch.dtype) -> None:
    images = [torch.randn(3, 300, 5, 4).to(dtype, memory_format=torch.channels_last) for _ in range(3)]
    shortcut, x, grad = images[0].requires_grad_(), images[1].requires_grad_(), images[2]
    scale = torch.randn(3, 300, 1, 1, requires_grad=True)

    def run(shortcut: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        out = functional.scaled_add(shortcut, x, scale)
        return [out, *torch.autograd.grad(out, [shortcut, x, scale], grad)]

    assert cpu.can_add(shortcut, x, scale)
    ours = run(shortcut, x, grad)
    with kernels.plain_only():
        wanted = run(shortcut.float(), x.float(), grad.float())
    assert [t.dtype for t in ours] == [dtype, dtype, dtype, torch.float32]
    for a, b in zip(ours, wanted, strict=True):  # in bf16 rounded once, at the end
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2**-7 if a.dtype != torch.float32 else 1e-5, atol=1e-5)


def test_a_pooled_mean_s_derivatives_are_the_formula_s() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: functional.pooled_mean(x).sin(), x)
    assert torch.autograd.gradgradcheck(lambda x: functional.pooled_mean(x).sin(), x)


def test_beside_another_gradient_a_pooled_mean_s_leaves_the_image_s_layout() -> None:
    x = torch.randn(2, 8, 5, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = x * 2
    (y * functional.pooled_mean(y)[:, :, None, None]).sum().backward()
    exact = 4 * (x.detach().sum((2, 3), keepdim=True) * 2 / 20).expand_as(x)
    assert x.grad is not None and x.grad.stride() == x.stride()
    torch.testing.assert_close(x.grad, exact)


def test_under_autocast_the_gates_are_computed_in_fp32() -> None:
    gate, x = SqueezeExcite(8, 4), torch.randn(2, 8, 5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gates = gate(x)
    torch.testing.assert_close(gates, gate(x.float()))


@pytest.mark.parametrize("native", [True, False])
def test_under_autocast_the_filters_are_rounded_once(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "multiplies_bf16", lambda: native)
    conv, x = WSConv2d(8, 8, 3), torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        ours = conv(x)
        with kernels.plain_only():
            wanted = conv(x)
    assert ours.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(ours, wanted, rtol=2**-6, atol=2**-6)
    ours.float().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.float32


def test_a_frozen_convolution_computes_no_gradient_of_its_filters() -> None:
    conv, x = WSConv2d(8, 8, 1).requires_grad_(False), torch.randn(1, 8, 3, 3, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None and conv.weight.grad is None


@pytest.mark.parametrize("part", [ScaledActivation("silu", 0.7), ScaledActivation("gelu"), WSConv2d(4, 6, 3)])
def test_derivatives_of_derivatives_equal_plain_torch(part: nn.Module) -> None:
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = [x, *part.parameters()]

    def penalty() -> list[torch.Tensor]:
        out = part(x)
        slopes = torch.autograd.grad((out * out.detach().cos()).sum(), inputs, create_graph=True)
        total = torch.stack([s.square().sum() for s in slopes]).sum()
        return [g for g in torch.autograd.grad(total, inputs, allow_unused=True) if g is not None]

    ours = penalty()
    with kernels.plain_only():
        wanted = penalty()
    assert len(ours) == len(wanted) and all(relative(a, b) < 1e-4 for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("is_clipped", [True, False])
@pytest.mark.parametrize("way", ["loops", "foreach"])
def test_an_update_equals_the_reference(way: str, is_clipped: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5, 3, 3), (40_000,), (6, 11), (1,))
    weights = [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]
    optimizer = SGD(weights, lr=0.5, weight_decay=0.1, ema_decay=0.9)
    expected = [w.detach().clone() for w in weights]
    momenta, averages = [torch.zeros_like(w) for w in expected], [w.clone() for w in expected]
    for step in range(3):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
        grads = [w.grad for w in weights]
        factors = coefficients(square_sums(weights), square_sums(grads), 0.01) if is_clipped else None
        rates = reference.Rates(lr=0.5, momentum=0.9, weight_decay=0.1, keep=min(0.9, (1 + step) / (10 + step)))
        reference.update_(expected, grads, momenta, averages, rates, factors)
        optimizer.factors = None if factors is None else [factors]
        with kernels.plain_only() if way == "foreach" else nullcontext():
            optimizer.step()
        assert optimizer.factors is None
    for i, w in enumerate(weights):
        torch.testing.assert_close(w.detach(), expected[i], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.state[w]["momentum"], momenta[i], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.state[w]["ema"], averages[i], rtol=2e-6, atol=1e-6)


def test_sums_of_squares_equal_the_reference_and_tell_what_is_not_finite() -> None:
    tensors = [torch.randn(s) for s in ((7, 5, 3, 3), (40_000,), (6, 11), (1,), ())]
    torch.testing.assert_close(square_sums(tensors), reference.square_sums(tensors))
    tensors[2][4, 3] = float("nan")
    assert torch.nonzero(~square_sums(tensors).isfinite()).flatten().tolist() == [7 + 1 + 4]


def test_the_number_of_threads_changes_no_bit() -> None:
    weight, x = torch.randn(96, 64, 3, 3), torch.randn(4, 64, 40, 40)
    before = torch.get_num_threads()

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        made = cpu.standardise(weight, torch.ones(96))
        back = cpu.standardise_backward(made.out.sin(), weight, torch.ones(96), *made[1:])
        several = [[t.clone() for t in (weight, made.out, x)] for _ in range(4)]
        sums = cpu.square_sums(several[0])
        cpu.update_(*several, reference.Rates(lr=0.1, momentum=0.9, weight_decay=0.1, keep=0.5), sums.sigmoid())  # type: ignore[arg-type, call-arg]
        updated = [t for tensors in several for t in tensors]
        return [made.out, *back, cpu.scaled_activation(x, "gelu", 1.7), sums, *updated]

    try:
        one, three = run(1), run(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_timm_s_form_of_the_standardisation_is_an_option() -> None:
    from timm.layers import ScaledStdConv2d

    theirs = ScaledStdConv2d(6, 4, 3, eps=1e-5)
    ours = WSConv2d(6, 4, 3, form=Standardisation(1e-5, "symmetric"))
    ours.weight.data, ours.gain.data = theirs.weight.data, theirs.gain.data.flatten()
    nn.init.zeros_(theirs.bias)
    x = torch.randn(1, 6, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_every_fused_activation_has_its_published_gamma() -> None:
    assert set(cpu.KINDS) <= set(GAMMA)
    x = torch.randn(100)
    for name in cpu.KINDS:
        torch.testing.assert_close(
            ScaledActivation(name)(x),
            functional.scaled_activation(x.double(), name, ScaledActivation(name).function, GAMMA[name]).float(),
        )


@pytest.mark.parametrize(
    "gain", [torch.linspace(0.5, 2, 8).bfloat16(), torch.linspace(0.5, 2, 16)[::2], torch.ones(1).expand(8)]
)
def test_gains_of_another_type_or_with_gaps_are_read_right(gain: torch.Tensor) -> None:
    weight, bias, x = torch.randn(8, 4, 3, 3), torch.zeros(8), torch.randn(1, 4, 5, 5)
    settings = {"stride": 1, "padding": (1, 1), "groups": 1}
    ours = functional.ws_conv2d(x, weight, gain, bias, **settings)  # type: ignore[arg-type]
    wanted = functional.ws_conv2d(x, weight, gain.float().contiguous(), bias, **settings)  # type: ignore[arg-type]
    assert relative(ours, wanted) < 1e-5
