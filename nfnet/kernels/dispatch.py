"""Which implementation serves given tensors: the CPU's loops, the GPU's programs, or None for plain torch.

A GPU's programs are tried once a device and process on a few numbers, against plain torch: where they do not compile
there, or compute something else, one warning says so and plain torch serves.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch._subclasses import FakeTensor

from nfnet.kernels import cpu, reference, triton_layers, usable
from nfnet.kernels.tensor_lists import same_layout

_GPU_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def for_weight(weight: torch.Tensor, gain: torch.Tensor, out_dtype: torch.dtype) -> ModuleType | None:
    """Of `standardise` and `standardise_backward`."""
    # Kernels read gains through a pointer: of another type or with gaps they would read something else.
    if gain.dtype != weight.dtype or gain.device != weight.device or not gain.is_contiguous():
        return None
    if cpu.can_standardise(weight, out_dtype):
        return cpu
    if _is_predicted(weight):
        return reference
    on_gpu = (
        cpu.is_ordinary(weight)
        and weight.is_cuda
        and weight.dtype == torch.float32
        and out_dtype in _GPU_TYPES
        and cpu.is_dense(weight)
    )
    return triton_layers if on_gpu and _gpu_serves(weight) else None


def for_activation(x: torch.Tensor, name: str) -> ModuleType | None:
    """Of `scaled_activation` and `scaled_activation_backward`."""
    if cpu.can_activate(x, name):
        return cpu
    if _is_predicted(x) and name in reference.ACTIVATIONS:
        return reference
    on_gpu = (
        cpu.is_ordinary(x) and x.is_cuda and name in reference.ACTIVATIONS and x.dtype in _GPU_TYPES and cpu.is_dense(x)
    )
    return triton_layers if on_gpu and _gpu_serves(x) else None


def for_update(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
) -> ModuleType | None:
    """Of `update_`."""
    if cpu.can_update(weights, gradients, momenta, averages):
        return cpu
    wide = (*weights, *momenta, *averages)
    on_gpu = all(cpu.is_ordinary(t) and t.is_cuda and t.dtype == torch.float32 and cpu.is_dense(t) for t in wide)
    alike = all(same_layout(s, w) for kind in (momenta, averages) if kind for s, w in zip(kind, weights, strict=True))
    types = {g.dtype for g in gradients}
    if not (on_gpu and alike and len(types) == 1 and types <= set(_GPU_TYPES)):
        return None
    return triton_layers if len({t.device for t in (*wide, *gradients)}) == 1 and _gpu_serves(weights[0]) else None


def for_square_sums(tensors: Sequence[torch.Tensor]) -> ModuleType | None:
    """Of `square_sums`."""
    if cpu.can_update(tensors):
        return cpu
    on_gpu = all(cpu.is_ordinary(t) and t.is_cuda and t.dtype in _GPU_TYPES and cpu.is_dense(t) for t in tensors)
    if not on_gpu or len({(t.dtype, t.device) for t in tensors}) != 1:
        return None
    return triton_layers if _gpu_serves(tensors[0]) else None


def _is_predicted(tensor: torch.Tensor) -> bool:
    """A tensor without contents, of a step whose memory is being counted: what the kernels would keep is what counts."""
    return isinstance(tensor, FakeTensor) and usable()


def _gpu_serves(tensor: torch.Tensor) -> bool:
    return usable() and triton_layers.is_usable(tensor) and not gpu_problem(tensor.device)


@lru_cache
def gpu_problem(device: torch.device) -> str:
    """What is wrong with the programs on this device, "" if nothing is; warns once."""
    try:
        with torch.random.fork_rng(devices=[device]), torch.no_grad():
            wrong = _compare(device)
    except Exception as error:  # a compiler and a driver can fail in any way; what follows is slower and not wrong
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(f"the fused GPU kernels are not used on {device}, plain torch is: {wrong}", stacklevel=2)
    return wrong


def _compare(device: torch.device) -> str:
    weight, gain = torch.randn(8, 48, 3, 3, device=device), torch.randn(8, device=device)
    made, plain = triton_layers.standardise(weight, gain), reference.standardise(weight, gain)
    back = triton_layers.standardise_backward(weight.cos(), weight, gain, *made[1:])
    expected_back = reference.standardise_backward(weight.cos(), weight, gain, *plain[1:])
    pairs = [("weight standardisation", made.out, plain.out)]
    pairs += [("the derivative of weight standardisation", a, b) for a, b in zip(back, expected_back, strict=True)]
    for name in reference.ACTIVATIONS:
        pairs.append(
            (name, triton_layers.scaled_activation(weight, name, 1.7), reference.scaled_activation(weight, name, 1.7))
        )
        slopes = [k.scaled_activation_backward(weight.cos(), weight, name, 1.7) for k in (triton_layers, reference)]
        pairs.append((f"the derivative of {name}", slopes[0], slopes[1]))
    numbers = reference.Rates(lr=0.1, momentum=0.9, weight_decay=0.1, keep=0.5), gain.sigmoid()
    lists = [[[t.clone()] for t in (weight, weight.cos(), weight.sin(), weight)] for _ in range(2)]
    triton_layers.update_(*lists[0], *numbers)  # type: ignore[arg-type, call-arg]
    reference.update_(*lists[1], *numbers)  # type: ignore[arg-type, call-arg]
    pairs += [("the update", a[0], b[0]) for a, b in zip(*lists, strict=True)]
    pairs.append(("sums of squares", triton_layers.square_sums([weight, gain]), reference.square_sums([weight, gain])))
    for what, ours, expected in pairs:
        if not torch.allclose(ours, expected, rtol=1e-4, atol=1e-5):
            return f"{what} differs by {float((ours - expected).abs().max()):.2g}"
    return ""
