"""Triton programs of norms and updates over a whole list of tensors: pointers and places come from tables.

pointers: (4, num_tensors) int64, the addresses of weights, gradients, momenta, averages.
sizes: (2, num_tensors) int32, the elements of a unit and the number of the tensor's first unit in the list.
items: (num_programs, 4) int32, what a program works on: tensor, first unit, units, first element of the units.
POINTER_ALIGN (bytes) and LENGTH_ALIGN (elements) divide all addresses and all lengths: with them the compiler can load
16 bytes a thread.
"""

import triton
import triton.language as tl


@triton.jit
def row_of(pointers, index, DTYPE: tl.constexpr, POINTER_ALIGN: tl.constexpr):
    return tl.multiple_of(tl.load(pointers + index).to(tl.pointer_type(DTYPE)), POINTER_ALIGN)


@triton.jit
def square_sums(
    pointers,
    sizes,
    items,
    sums,
    num_tensors,
    TYPE: tl.constexpr,
    POINTER_ALIGN: tl.constexpr,
    LENGTH_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = items + tl.program_id(0) * 4
    tensor = tl.load(item)
    unit = tl.load(item + 1) + tl.arange(0, ROWS)
    is_unit = tl.arange(0, ROWS) < tl.load(item + 2)
    length = tl.multiple_of(tl.load(sizes + tensor), LENGTH_ALIGN)
    values = row_of(pointers, tensor, TYPE, POINTER_ALIGN)
    rows = (unit.to(tl.int64) * length)[:, None]
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, length, BLOCK):
        inside = is_unit[:, None] & (start + lane < length)[None, :]
        value = tl.load(values + rows + (start + lane)[None, :], mask=inside, other=0.0).to(tl.float32)
        total += value * value
    number = tl.load(sizes + num_tensors + tensor) + unit
    tl.store(sums + number, tl.sum(total, 1), mask=is_unit)


@triton.jit
def update(
    pointers,
    sizes,
    items,
    factor_of,
    num_tensors,
    lr,
    momentum,
    weight_decay,
    share,
    TYPE: tl.constexpr,
    SCALE: tl.constexpr,
    AVERAGE: tl.constexpr,
    POINTER_ALIGN: tl.constexpr,
    LENGTH_ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything after the clip's factors, in one pass. TYPE is that of the gradients; `share` is what the average takes of
    the new weight, 1 - keep."""
    item = items + tl.program_id(0) * 4
    tensor = tl.load(item)
    unit = tl.load(item + 1) + tl.arange(0, ROWS)
    is_unit = tl.arange(0, ROWS) < tl.load(item + 2)
    first = tl.multiple_of(tl.load(item + 3), 16)
    length = tl.multiple_of(tl.load(sizes + tensor), LENGTH_ALIGN)
    weight = row_of(pointers, tensor, tl.float32, POINTER_ALIGN)
    gradient = row_of(pointers, num_tensors + tensor, TYPE, POINTER_ALIGN)
    velocity = row_of(pointers, 2 * num_tensors + tensor, tl.float32, POINTER_ALIGN)
    rows = (unit.to(tl.int64) * length)[:, None]
    lane = tl.arange(0, BLOCK)
    if SCALE:
        number = tl.load(sizes + num_tensors + tensor) + unit
        scale = tl.load(factor_of + number, mask=is_unit, other=0.0)[:, None]
    else:
        scale = 1.0
    for start in range(first, tl.minimum(length, first + CHUNK), BLOCK):
        place = rows + (start + lane)[None, :]
        inside = is_unit[:, None] & (start + lane < length)[None, :]
        w = tl.load(weight + place, mask=inside, other=0.0)
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * scale + weight_decay * w
        m = momentum * tl.load(velocity + place, mask=inside, other=0.0) + g
        w -= lr * (g + momentum * m)
        tl.store(velocity + place, m, mask=inside)
        tl.store(weight + place, w, mask=inside)
        if AVERAGE:
            average = row_of(pointers, 3 * num_tensors + tensor, tl.float32, POINTER_ALIGN)
            e = tl.load(average + place, mask=inside, other=0.0)
            tl.store(average + place, e + share * (w - e), mask=inside)
