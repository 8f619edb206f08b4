"""Triton programs of the scaled activations: one read, one write, both constants folded in, rounded once."""

import triton
import triton.language as tl

GELU_SCALE = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi): tanh(v) = 2 sigmoid(2 v) - 1
GELU_CUBE = tl.constexpr(0.044715)
SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def forward(x, out, numel, before, factor, NAME: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    inside = place < numel
    u = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * before
    if NAME == "gelu":
        y = u * tl.sigmoid((u + u * u * u * GELU_CUBE) * GELU_SCALE)
    elif NAME == "gelu_erf":
        y = u * 0.5 * (1.0 + tl.erf(u * SQRT_HALF))
    elif NAME == "silu":
        y = u * tl.sigmoid(u)
    else:
        tl.static_assert(NAME == "relu")
        y = tl.where(u <= 0.0, 0.0, u)  # so that NaN stays NaN
    tl.store(out + place, (y * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward(grad, x, out, numel, before, factor, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """out = grad * f'(x * before) * factor, where `factor` includes `before` already."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    inside = place < numel
    u = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * before
    if NAME == "gelu":
        s = tl.sigmoid((u + u * u * u * GELU_CUBE) * GELU_SCALE)
        slope = s + u * s * (1.0 - s) * (1.0 + u * u * GELU_CUBE * 3.0) * GELU_SCALE
    elif NAME == "gelu_erf":
        slope = 0.5 * (1.0 + tl.erf(u * SQRT_HALF)) + u * NORMAL_DENSITY * tl.exp(-0.5 * u * u)
    elif NAME == "silu":
        s = tl.sigmoid(u)
        slope = s * (1.0 + u * (1.0 - s))
    else:
        tl.static_assert(NAME == "relu")
        slope = tl.where(u > 0.0, 1.0, 0.0)
    value = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * slope * factor
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
