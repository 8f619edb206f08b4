"""Fused loops for the parts of a step that only move memory, each with a plain torch reference of the same signature.

`reference` is what the tests compare every other implementation with. `cpu` binds the CPU's loops, compiled at installation.
`triton_layers` and `triton_update` launch the Triton programs of `triton_weight_kernels`, `triton_activation_kernels` and
`triton_update_kernels`; importing them loads no Triton.
"""

import contextlib
from collections.abc import Iterator

import torch

LAUNCH = {"enable_fp_fusion": True}
"""Of every Triton program: a * b + c is rounded once. Given explicitly because Triton's own default changes between versions."""

_plain_only = False


@contextlib.contextmanager
def plain_only() -> Iterator[None]:
    """Inside, everything runs through plain torch: for comparisons, and for derivatives of derivatives."""
    global _plain_only
    before, _plain_only = _plain_only, True
    try:
        yield
    finally:
        _plain_only = before


def usable() -> bool:
    """Whether a kernel may take part now: not in a graph that is being compiled or exported, nor under torch.func."""
    return not (_plain_only or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None)
