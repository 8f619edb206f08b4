"""Fused loops for the parts of a step that only move memory, each beside a plain torch twin of the same signature.

`plain` is the reference: the tests compare every other implementation with it. `native` binds the CPU's loops, compiled
at installation. `gpu` launches the Triton programs; importing it loads no Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

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
