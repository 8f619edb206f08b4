"""Triton programs of the weight standardisation: one program a unit, one read of DRAM (later passes hit the cache)."""

import triton
import triton.language as tl


@triton.jit
def turned(index, inner, outer, TURN: tl.constexpr):
    """Where the element at `index` of a unit lies in a tensor of the other layout: (a, b) order becomes (b, a)."""
    if TURN:
        index = (index % inner) * outer + index // inner
    return index


@triton.jit
def standardise(
    weight,
    gain,
    out,
    means,
    rstds,
    floored,
    fan_in,
    inner,
    outer,
    floor,
    added_eps,
    ADD_EPS: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight, out: (units, fan_in) as they lie in memory; `inner`, `outer`: see `turned`; the rest: (units,)."""
    unit = tl.program_id(0)
    row = weight + unit.to(tl.int64) * fan_in
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, fan_in, BLOCK):
        total += tl.load(row + start + lane, mask=start + lane < fan_in, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / fan_in
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, fan_in, BLOCK):
        inside = start + lane < fan_in
        apart = tl.load(row + start + lane, mask=inside, other=0.0).to(tl.float32) - mean
        squares += tl.where(inside, apart * apart, 0.0)
    # var * N is the plain sum of squares: no division.
    scaled = tl.sum(squares, 0)
    if ADD_EPS:
        scaled += added_eps * fan_in
        is_floored = scaled < 0.0
    else:
        is_floored = scaled < floor
        scaled = tl.where(is_floored, floor, scaled)  # and not maximum, which could turn NaN into the floor
    rstd = 1.0 / tl.sqrt_rn(scaled)
    tl.store(means + unit, mean)
    tl.store(rstds + unit, rstd)
    tl.store(floored + unit, is_floored.to(tl.uint8))
    scale = rstd * tl.load(gain + unit).to(tl.float32)
    written = out + unit.to(tl.int64) * fan_in
    for start in range(0, fan_in, BLOCK):
        inside = start + lane < fan_in
        value = tl.load(row + start + lane, mask=inside, other=0.0).to(tl.float32)
        place = turned(start + lane, inner, outer, TURN)
        tl.store(written + place, ((value - mean) * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def standardise_backward(
    grad_out,
    weight,
    gain,
    means,
    rstds,
    floored,
    grad_weight,
    grad_gain,
    fan_in,
    inner,
    outer,
    TURN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `plain.standardise_backward`; grad_out may lie in the other layout, grad_weight lies as the weight does."""
    unit = tl.program_id(0)
    first = unit.to(tl.int64) * fan_in
    lane = tl.arange(0, BLOCK)
    mean = tl.load(means + unit)
    rstd = tl.load(rstds + unit)
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, fan_in, BLOCK):
        inside = start + lane < fan_in
        value = tl.load(weight + first + start + lane, mask=inside, other=0.0).to(tl.float32)
        place = turned(start + lane, inner, outer, TURN)
        grad = tl.load(grad_out + first + place, mask=inside, other=0.0).to(tl.float32)
        total += grad
        along += grad * (value - mean)
    mean_grad = tl.sum(total, 0) / fan_in
    gain_grad = tl.sum(along, 0) * rstd
    tl.store(grad_gain + unit, gain_grad.to(grad_gain.dtype.element_ty))
    removed = tl.where(tl.load(floored + unit) != 0, 0.0, gain_grad) * rstd
    scale = rstd * tl.load(gain + unit).to(tl.float32)
    for start in range(0, fan_in, BLOCK):
        inside = start + lane < fan_in
        value = tl.load(weight + first + start + lane, mask=inside, other=0.0).to(tl.float32)
        place = turned(start + lane, inner, outer, TURN)
        grad = tl.load(grad_out + first + place, mask=inside, other=0.0).to(tl.float32)
        result = scale * (grad - mean_grad - (value - mean) * removed)
        tl.store(grad_weight + first + start + lane, result.to(grad_weight.dtype.element_ty), mask=inside)
