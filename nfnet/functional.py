"""The two operations that every layer is made of, with the fused kernels where there are any.

Gradients are those of the plain formulas, which serve compiled and exported graphs, derivatives of derivatives and
whatever the kernels do not take: other types, other devices, other layouts.
"""

import math
import platform
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from nfnet.kernels import cpu, dispatch, reference, usable

FEW_PIXELS = 256
"""Up to here a 1x1 convolution on the CPU is a matrix product: oneDNN's weight gradient takes three times as long."""
FEW_PIXELS_BF16 = 5000
"""Up to here the weight gradient alone of one in bf16 is: 0.63 to 0.85 of the time of oneDNN's kernel, which is its older one
there; forward and the image's gradient gain nothing (docs/LOG.md, 2026-12-01)."""


def is_autocast(x: torch.Tensor) -> bool:
    """Whether autocast would choose the precision of an operation on `x`."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def pooled_mean(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C), the mean over positions; fp32 under autocast."""
    dtype = torch.float32 if is_autocast(x) else x.dtype
    if usable() and cpu.is_ordinary(x):
        out: torch.Tensor = _PooledMean.apply(x, dtype)
        return out
    return x.mean(dim=(2, 3), dtype=dtype)


class _PooledMean(torch.autograd.Function):
    """torch lays the derivative of a channels-last image's mean out as contiguous; adding it to the image's other gradient
    then takes ten times as long as the sum of two images alike in memory. Here it is one number a sample and channel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return x.mean(dim=(2, 3), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, w = ctx.shape[2:]
        return (grad / (h * w)).to(ctx.dtype)[:, :, None, None].expand(ctx.shape), None


def outside_autocast(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of `x`, in fp32 where autocast would take less."""
    if not is_autocast(x):
        return function(x)
    with torch.autocast(x.device.type, enabled=False):
        return function(x.float())


def standardised(
    weight: torch.Tensor, gain: torch.Tensor, floor: float = 1e-4, added_eps: float | None = None
) -> torch.Tensor:
    """gain * (W - mean) * rsqrt(max(var * N, floor)) by output unit, or with (var + added_eps) * N; plain torch."""
    fan_in = weight.numel() // weight.shape[0]
    var, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
    scaled = torch.clamp(var * fan_in, min=floor) if added_eps is None else (var + added_eps) * fan_in
    return (weight - mean) * (torch.rsqrt(scaled) * gain.view(-1, 1, 1, 1))


def ws_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    *,
    stride: int,
    padding: tuple[int, int],
    groups: int,
    floor: float = 1e-4,
    added_eps: float | None = None,
) -> torch.Tensor:
    """Convolution (N, C, H, W) -> (N, O, H', W') with the standardised weight."""
    if is_autocast(x):
        half = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(half), bias.to(half)
    fused = dispatch.for_weight(weight, gain, x.dtype) if x.dtype == bias.dtype else None
    if fused is not None:
        out: torch.Tensor = _WSConv2d.apply(x, weight, gain, bias, stride, padding, groups, floor, added_eps, fused)
        return out
    return F.conv2d(x, standardised(weight, gain, floor, added_eps), bias, stride, padding, groups=groups)


class _WSConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        gain: torch.Tensor,
        bias: torch.Tensor,
        stride: int,
        padding: tuple[int, int],
        groups: int,
        floor: float,
        added_eps: float | None,
        fused: Any,
    ) -> torch.Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last else torch.preserve_format  # else the convolution would turn it each time
        made = fused.standardise(weight, gain, floor, added_eps, out_dtype=x.dtype, memory_format=form)
        ctx.save_for_backward(x, weight, gain, bias, *made)
        ctx.stride, ctx.padding, ctx.groups, ctx.fused = stride, padding, groups, fused
        ctx.numbers = floor, added_eps
        dtype, (x, out, bias) = x.dtype, multiplied(x, made.out, bias)
        pixels = _pixels(x, weight, stride, groups, FEW_PIXELS)
        if pixels is not None:
            return _image(torch.addmm(bias, pixels, out.view(len(weight), -1).t()), x).to(dtype)
        return F.conv2d(x, out, bias, stride, padding, groups=groups).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, gain, bias, out, mean, rstd, floored = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate this derivative
            again = F.conv2d(
                x,
                standardised(weight, gain, *ctx.numbers).to(x.dtype),
                bias,
                ctx.stride,
                ctx.padding,
                groups=ctx.groups,
            )
            return *_differentiable(again, (x, weight, gain, bias), grad, ctx.needs_input_grad), *[None] * 6
        dtype, (grad, x, out) = x.dtype, multiplied(grad, x, out)
        wants_x, wants_weight, wants_gain, wants_bias = ctx.needs_input_grad[:4]
        of_weight = wants_weight or wants_gain
        pixels = _pixels(
            x, weight, ctx.stride, ctx.groups, FEW_PIXELS_BF16 if x.dtype == torch.bfloat16 else FEW_PIXELS
        )
        few_x = few_out = few_bias = grad_weight = grad_gain = None
        if pixels is not None:
            grads = grad.permute(0, 2, 3, 1).reshape(len(pixels), -1)
            few_out = (grads.t() @ pixels).view_as(weight) if of_weight else None
            few_bias = _column_sums(grads) if wants_bias else None
            if wants_x and len(pixels) <= FEW_PIXELS:
                few_x, wants_x = _image(grads @ out.view(len(weight), -1), x), False
            of_weight = wants_bias = False
        shape = [len(weight)], [ctx.stride] * 2, ctx.padding, [1, 1], False, [0, 0], ctx.groups
        asked = [wants_x, of_weight, wants_bias]
        made = torch.ops.aten.convolution_backward(grad, x, out, *shape, asked) if any(asked) else asked
        grad_x, grad_out, grad_bias = (
            m if a else f for m, a, f in zip(made, asked, (few_x, few_out, few_bias), strict=True)
        )
        if grad_out is not None:
            grad_weight, grad_gain = ctx.fused.standardise_backward(
                grad_out, weight, gain, mean, rstd, floored, in_place=True
            )
        grad_x, grad_bias = (None if g is None else g.to(dtype) for g in (grad_x, grad_bias))
        return grad_x, grad_weight, grad_gain, grad_bias, *[None] * 6


def _differentiable(
    out: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, wanted: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The first derivatives through plain torch, as a graph that can be differentiated again."""
    found = iter(
        torch.autograd.grad(out, [t for t, w in zip(inputs, wanted, strict=False) if w], grad, create_graph=True)
    )
    return tuple(next(found) if w else None for _, w in zip(inputs, wanted, strict=False))


@lru_cache
def multiplies_bf16() -> bool:
    """Whether the processor does: oneDNN says that it can wherever there is AVX-512, and without AVX512_BF16 it emulates."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplied(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the type in which they are multiplied fastest: fp32 where the processor would emulate bf16.

    A step of F0 takes 0.57 to 0.64 of the time so (docs/LOG.md, 2026-12-01). Sums are in fp32 either way.
    """
    if tensors[0].dtype != torch.bfloat16 or tensors[0].device.type != "cpu" or multiplies_bf16():
        return tensors
    return tuple(t.float() for t in tensors)


def _column_sums(rows: torch.Tensor) -> torch.Tensor:
    """(P, O) -> (O,). In bf16 as a product with ones: torch's sum over rows takes half as long as the weight's gradient there."""
    return (rows.new_ones(1, len(rows)) @ rows).view(-1) if rows.dtype == torch.bfloat16 else rows.sum(0)


def _pixels(x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int, most: int) -> torch.Tensor | None:
    """(N * H * W, C), a view of a channels-last image; None where the convolution is no matrix product of `most` pixels."""
    n, c, h, w = x.shape
    if x.is_cuda or weight.shape[2] > 1 or stride > 1 or groups > 1 or n * h * w > most:
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    return x.permute(0, 2, 3, 1).reshape(n * h * w, c)


def _image(pixels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    n, _, h, w = like.shape
    return pixels.view(n, h, w, -1).permute(0, 3, 1, 2)


def scaled_activation(
    x: torch.Tensor, name: str, function: Any, factor: float | torch.Tensor, before: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """function(x * before) * factor; `name` says which function that is. Of the two, scalar tensors are for compiled graphs."""
    fused = dispatch.for_activation(x, name)
    if fused is not None:
        out: torch.Tensor = _ScaledActivation.apply(x, name, float(factor), float(before), fused)
        return out
    y: torch.Tensor = function(x if isinstance(before, float) and before == 1.0 else x * before)
    return y.mul(factor)


class _ScaledActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, factor: float, before: float, fused: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.factor, ctx.before, ctx.fused = name, factor, before, fused
        out: torch.Tensor = fused.scaled_activation(x, name, factor, before)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            again = reference.scaled_activation(x, ctx.name, ctx.factor, ctx.before)
            return *_differentiable(again, (x,), grad, ctx.needs_input_grad), *[None] * 4
        return ctx.fused.scaled_activation_backward(grad, x, ctx.name, ctx.factor, ctx.before), *[None] * 4


def scaled_add(shortcut: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """shortcut + x * coefficient: images (N, C, H, W), coefficient broadcast from (N or 1, C or 1, 1, 1) or (1,)."""
    if cpu.can_add(shortcut, x, coefficient):
        out: torch.Tensor = _ScaledAdd.apply(shortcut, x, coefficient)
        return out
    return torch.addcmul(shortcut, x, coefficient.to(x.dtype))


class _ScaledAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shortcut: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, coefficient)
        return cpu.scaled_add(shortcut, x, coefficient)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, coefficient = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad, *_differentiable(x * coefficient, (x, coefficient), grad, ctx.needs_input_grad[1:])
        return grad, *cpu.scaled_add_backward(grad, x, coefficient)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME": output ceil(size / stride), the odd pixel of padding at the end."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def padded(
    x: torch.Tensor, kernel: int, stride: int, padding: str, value: float = 0.0
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The image, padded where the operation itself cannot, and the padding that is left to the operation."""
    if padding == "symmetric":
        return x, (kernel // 2, kernel // 2)
    top, bottom = same_padding(x.shape[2], kernel, stride)
    left, right = same_padding(x.shape[3], kernel, stride)
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), value=value), (0, 0)
