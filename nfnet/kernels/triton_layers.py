"""The Triton kernels, with the signatures of `plain`; formulas, arguments and errors are described there.

Beyond what `plain` raises: ValueError for types, layouts and sizes that no kernel reads. Triton itself is loaded by the first
call. No call waits for the device.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch

from nfnet.kernels import LAUNCH
from nfnet.kernels.reference import ACTIVATIONS, Standardised
from nfnet.kernels.tensor_lists import check_counts
from nfnet.kernels.triton_update import square_sums, update_

__all__ = [
    "is_usable",
    "scaled_activation",
    "scaled_activation_backward",
    "square_sums",
    "standardise",
    "standardise_backward",
    "update_",
]

_ELEMENTS = 1024
"""Of an activation that a program works on: 8 a thread, 16 bytes in half precision."""


def is_usable(tensor: torch.Tensor) -> bool:
    """Does this tensor lie on a GPU, and is there a Triton to compile for it?"""
    return tensor.is_cuda and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def standardise(
    weight: torch.Tensor,
    gain: torch.Tensor,
    floor: float = 1e-4,
    added_eps: float | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Standardised:
    from nfnet.kernels import triton_weight_kernels as programs

    _check_type(weight)
    format_of_weight = _format(weight)
    units, fan_in = weight.shape[0], weight[0].numel()
    check_counts(fan_in, units)
    out = torch.empty_like(weight, dtype=out_dtype or weight.dtype, memory_format=memory_format)
    mean, rstd = (torch.empty(units, device=weight.device, dtype=torch.float32) for _ in range(2))
    floored = torch.empty(units, device=weight.device, dtype=torch.bool)
    with torch.cuda.device_of(weight):
        programs.standardise[(units,)](
            weight,
            gain.contiguous(),
            out,
            mean,
            rstd,
            floored.view(torch.uint8),
            fan_in,
            *_turn(weight, format_of_weight),
            floor,
            added_eps or 0.0,
            ADD_EPS=added_eps is not None,
            TURN=not out.is_contiguous(memory_format=format_of_weight),
            **_block(fan_in),
            **LAUNCH,
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
    """`in_place`: an fp32 `grad_out` is the caller's own and may become the result."""
    from nfnet.kernels import triton_weight_kernels as programs

    _check_type(weight)
    _check_type(grad_out)
    format_of_weight = _format(weight)
    if not (grad_out.is_contiguous() or grad_out.is_contiguous(memory_format=torch.channels_last)):
        grad_out = grad_out.contiguous(memory_format=format_of_weight)
    fan_in = weight[0].numel()
    turned = not grad_out.is_contiguous(memory_format=format_of_weight)
    own = in_place and grad_out.dtype == weight.dtype and not turned
    grad_weight = grad_out if own else torch.empty_like(weight)
    grad_gain = torch.empty_like(gain, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(weight):
        programs.standardise_backward[(weight.shape[0],)](
            grad_out,
            weight,
            gain.contiguous(),
            mean,
            rstd,
            floored.view(torch.uint8),
            grad_weight,
            grad_gain,
            fan_in,
            *_turn(weight, format_of_weight),
            TURN=turned,
            **_block(fan_in),
            **LAUNCH,
        )
    return grad_weight, grad_gain


def _check_type(tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the GPU kernels compute in fp32 and cannot take {tensor.dtype}; use nfnet.kernels.reference")


def _format(weight: torch.Tensor) -> torch.memory_format:
    for found in (torch.contiguous_format, torch.channels_last):
        if weight.dim() == 4 and weight.is_contiguous(memory_format=found):
            return found
    raise ValueError(
        f"a weight of shape {tuple(weight.shape)} has strides {weight.stride()}; make it (O, I, kh, kw), contiguous or "
        "channels-last"
    )


def _turn(weight: torch.Tensor, format_of_weight: torch.memory_format) -> tuple[int, int]:
    """Elements along the inner and the outer dimension of a unit as it lies in memory: channels and positions."""
    channels, positions = weight.shape[1], weight[0, 0].numel()
    return (positions, channels) if format_of_weight == torch.contiguous_format else (channels, positions)


def _block(fan_in: int) -> dict[str, int]:
    block = min(2048, max(32, 1 << (fan_in - 1).bit_length()))
    return {"BLOCK": block, "num_warps": min(4, max(1, block // 256))}


def scaled_activation(x: torch.Tensor, name: str, factor: float, before: float = 1.0) -> torch.Tensor:
    from nfnet.kernels import triton_activation_kernels as programs

    x = _dense(x, name)
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            programs.forward[_grid(x)](
                x, out, x.numel(), float(before), float(factor), NAME=name, BLOCK=_ELEMENTS, **LAUNCH
            )
    return out


def scaled_activation_backward(
    grad: torch.Tensor, x: torch.Tensor, name: str, factor: float, before: float = 1.0
) -> torch.Tensor:
    from nfnet.kernels import triton_activation_kernels as programs

    x = _dense(x, name)
    _check_type(grad)
    out = torch.empty_like(x)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    if x.numel():
        with torch.cuda.device_of(x):
            programs.backward[_grid(x)](
                grad, x, out, x.numel(), float(before), float(factor * before), NAME=name, BLOCK=_ELEMENTS, **LAUNCH
            )
    return out


def _dense(x: torch.Tensor, name: str) -> torch.Tensor:
    """Without gaps in memory; what has any is copied."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no fused activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")
    _check_type(x)
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if is_dense else x.contiguous()


def _grid(x: torch.Tensor) -> tuple[int]:
    return (-(-x.numel() // _ELEMENTS),)
