"""Bindings of the CPU's fused loops (`native.c`). Signatures and arithmetic are those of `reference`.

The extension is compiled when the package is installed. Where there is none, or one that was compiled for another version of
this file, `problem` gives the reason and everything runs through plain torch.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from nfnet.kernels import usable
from nfnet.kernels.reference import Rates, Standardised, Tensors, num_units

KINDS = {"gelu": 0, "silu": 1, "relu": 2}
HALF = {torch.float32: 0, torch.bfloat16: 1}
INTERFACE = 2
"""As `nf_interface` of `native.c`: called with other arguments than it was compiled for, a loop would write anywhere."""


def _load() -> tuple[ctypes.CDLL | None, str]:
    # No module to import but a plain library, so that building it takes a compiler and not Python's headers.
    found = importlib.util.find_spec("nfnet.kernels._native")
    if found is None or found.origin is None:
        return None, "the compiled loops are missing: install normfree again with a C compiler on the machine"
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:
        return None, f"the compiled loops do not load ({error}): install normfree again on this machine"
    number = library.nf_interface() if hasattr(library, "nf_interface") else 0
    if number != INTERFACE:
        return None, (
            f"the compiled loops are of another version (interface {number}, not {INTERFACE}): install normfree again"
        )
    return library, ""


_library, problem = _load()
"""The loaded loops, and why there are none ("" if there are)."""


def _call(name: str, *arguments: Any) -> None:
    assert _library is not None
    getattr(_library, name)(*arguments)


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


_long, _float = ctypes.c_int64, ctypes.c_float


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Real memory that a pointer leads to: no fake, traced or distributed tensor."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def is_dense(tensor: torch.Tensor) -> bool:
    """Elements without gaps and each unit (first dimension) together in memory."""
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def laid_out_as(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """The same values in the order in memory of `model`, itself if it has that."""
    if model.dim() == 4 and model.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def can_standardise(weight: torch.Tensor, out_dtype: torch.dtype) -> bool:
    return (
        _library is not None
        and usable()
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and out_dtype in HALF
        and is_ordinary(weight)
        and is_dense(weight)
    )


def standardise(
    weight: torch.Tensor,
    gain: torch.Tensor,
    floor: float = 1e-4,
    added_eps: float | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Standardised:
    """As `reference.standardise`; of memory formats, the weight's own and channels-last."""
    rows = weight.shape[0]
    out = torch.empty_like(weight, dtype=out_dtype or weight.dtype, memory_format=memory_format)
    mean, rstd = weight.new_empty(rows), weight.new_empty(rows)
    floored = torch.empty(rows, dtype=torch.bool)
    _call(
        "nf_standardise",
        _at(weight),
        _at(gain),
        _at(out),
        HALF[out.dtype],
        _at(mean),
        _at(rstd),
        _at(floored),
        _long(rows),
        _long(weight.numel() // rows),
        _long(_turned(out, weight)),
        _float(floor),
        _float(-1.0 if added_eps is None else added_eps),
    )
    return Standardised(out, mean, rstd, floored)


def standardise_backward(
    grad_out: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    floored: torch.Tensor,
    *,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.standardise_backward`; `in_place`: an fp32 `grad_out` is the caller's own and may become the result."""
    rows, turned = weight.shape[0], _turned(grad_out, weight)
    grad_out = grad_out if turned else laid_out_as(grad_out, weight)
    own = in_place and grad_out.dtype == torch.float32 and not turned
    grad_weight = grad_out if own else torch.empty_like(weight)
    grad_gain = torch.empty_like(gain)
    _call(
        "nf_standardise_backward",
        _at(grad_out),
        HALF[grad_out.dtype],
        _at(weight),
        _at(gain),
        _at(mean),
        _at(rstd),
        _at(floored),
        _at(grad_weight),
        _at(grad_gain),
        _long(rows),
        _long(weight.numel() // rows),
        _long(turned),
    )
    return grad_weight, grad_gain


def _turned(tensor: torch.Tensor, weight: torch.Tensor) -> int:
    """Positions of the kernel where the weight is contiguous and `tensor` channels-last, else 0."""
    last = torch.channels_last
    if weight.is_contiguous() and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
        return weight.shape[2] * weight.shape[3]
    return 0


def can_activate(x: torch.Tensor, name: str) -> bool:
    if _library is None or not usable():
        return False
    return x.device.type == "cpu" and x.dtype in HALF and name in KINDS and is_ordinary(x) and is_dense(x)


def scaled_activation(x: torch.Tensor, name: str, factor: float, before: float = 1.0) -> torch.Tensor:
    y = torch.empty_like(x)
    _call("nf_activation", KINDS[name], _at(x), _at(y), HALF[x.dtype], _long(x.numel()), _float(factor), _float(before))
    return y


def scaled_activation_backward(
    grad: torch.Tensor, x: torch.Tensor, name: str, factor: float, before: float = 1.0
) -> torch.Tensor:
    grad = laid_out_as(grad, x)
    out = torch.empty_like(x)
    _call(
        "nf_activation_backward",
        KINDS[name],
        _at(grad),
        _at(x),
        _at(out),
        HALF[x.dtype],
        _long(x.numel()),
        _float(factor),
        _float(before),
    )
    return out


def can_add(shortcut: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor) -> bool:
    """Images of one shape and type, channels-last, and an fp32 coefficient for each sample and channel."""
    if _library is None or not usable() or x.dim() != 4 or shortcut.shape != x.shape:
        return False
    if coefficient.shape != (*x.shape[:2], 1, 1) or x.device.type != "cpu":
        return False
    if x.dtype not in HALF or shortcut.dtype != x.dtype or coefficient.dtype != torch.float32:
        return False
    return all(is_ordinary(t) for t in (shortcut, x, coefficient)) and all(
        t.is_contiguous(memory_format=torch.channels_last) for t in (shortcut, x)
    )


def scaled_add(shortcut: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor) -> torch.Tensor:
    """shortcut + x * coefficient: images (N, C, H, W), coefficient (N, C, 1, 1)."""
    out = torch.empty_like(x)
    n, c, h, w = x.shape
    coefficient = coefficient.contiguous()
    images = _at(shortcut), _at(x), _at(coefficient), _at(out), HALF[x.dtype]
    _call("nf_scaled_add", *images, _long(n), _long(h * w), _long(c))
    return out


def scaled_add_backward(
    grad: torch.Tensor, x: torch.Tensor, coefficient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives by x and coefficient; that by the shortcut is `grad`."""
    grad, coefficient = laid_out_as(grad, x), coefficient.contiguous()
    grad_x, grad_coefficient = torch.empty_like(x), torch.empty_like(coefficient)
    n, c, h, w = x.shape
    _call(
        "nf_scaled_add_backward",
        _at(grad),
        _at(x),
        _at(coefficient),
        _at(grad_x),
        HALF[x.dtype],
        _at(grad_coefficient),
        _long(n),
        _long(h * w),
        _long(c),
    )
    return grad_x, grad_coefficient


def can_update(*lists: Sequence[torch.Tensor]) -> bool:
    """Parameters, gradients, momenta and averages: fp32 on the CPU, the tensors of one parameter alike in memory."""
    if _library is None or not usable():
        return False
    for tensors in zip(*(found for found in lists if found), strict=True):
        if any(t.device.type != "cpu" or t.dtype != torch.float32 or not is_ordinary(t) for t in tensors):
            return False
        # Not strides: those of a 1x1 kernel differ in numbers that mean nothing.
        last = all(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
        if not last and not all(t.is_contiguous() for t in tensors):
            return False
    return True


def _pointers(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _rows(tensors: Sequence[torch.Tensor]) -> tuple[int, Any, Any]:
    """Rows of all, and of each its rows and their length."""
    rows = [num_units(t) for t in tensors]
    lengths = [t.numel() // max(units, 1) for t, units in zip(tensors, rows, strict=True)]
    array = _long * len(rows)
    return sum(rows), array(*rows), array(*lengths)


def square_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `reference.square_sums`, of dense fp32 tensors."""
    count, rows, lengths = _rows(tensors)
    sums = torch.empty(count)
    _call("nf_square_sums", _pointers(tensors), _at(sums), rows, lengths, _long(len(tensors)))
    return sums


def update_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    averages: Tensors,
    rates: Rates,
    factors: torch.Tensor | None = None,
) -> None:
    """As `reference.update_`."""
    _, rows, lengths = _rows(params)
    _call(
        "nf_update",
        *map(_pointers, (params, grads, momenta)),
        _pointers(averages) if averages else None,
        rows,
        lengths,
        _long(len(params)),
        _at(factors),
        *map(_float, (rates.lr, rates.momentum, rates.weight_decay, 1 - rates.keep)),
    )
    # Autograd, and whoever keeps something computed from a weight, sees writes by this number alone.
    torch.autograd.graph.increment_version([*params, *momenta, *averages])
