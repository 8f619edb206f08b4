"""What is known of a list of tensors since the last update, so that the host spends microseconds where checks cost milliseconds.

A plan is valid for the very tensor objects it was made of, at the addresses they had; gradients, which are allocated anew,
are looked at each time.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from nfnet.kernels import tables

_TYPES = {torch.float32, torch.bfloat16, torch.float16}
_MOST = 64
"""Plans that are kept: two for each parameter group of each network."""
_plans: dict[tuple[int, ...], Plan] = {}


class Plan:
    """Parameters and their states, checked; raises ValueError for what the programs cannot work on."""

    def __init__(self, params: Sequence[torch.Tensor], states: Sequence[Sequence[torch.Tensor]]) -> None:
        if not params:
            raise ValueError("there is no parameter to update; leave empty groups out")
        if len({p.device for p in params}) > 1:
            raise ValueError("the parameters of a group lie on several devices; give one device's at a time")
        if any(p.dtype != torch.float32 for p in params):
            raise ValueError("the update works on fp32 parameters; keep others as fp32 master weights")
        for p in params:
            if not (p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))):
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has strides {p.stride()}; make it contiguous or channels-last"
                )
        for kind, tensors in zip(("momentum", "average"), states, strict=False):
            _check_states(params, tensors, kind)
        self.device = params[0].device
        self.layout = tables.layout(tuple(p.shape for p in params), self.device)
        # Shapes and strides that gradients have come with and that lie as their parameter does.
        self.known: list[set[tuple[torch.Size, tuple[int, ...]]]] = [{(p.shape, p.stride())} for p in params]
        tensors = [*params, *(s for kind in states for s in kind)]
        self.tensors = [weakref.ref(t) for t in tensors]
        self.addresses = [t.data_ptr() for t in tensors]

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        return all(r() is t for r, t in zip(self.tensors, tensors, strict=True)) and self.addresses == [
            t.data_ptr() for t in tensors
        ]

    def gradients(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each laid out as its parameter; what is not is copied."""
        if len(params) != len(grads):
            raise ValueError(f"there are {len(params)} parameters and {len(grads)} gradients; give as many")
        types = {g.dtype for g in grads}
        if len(types) > 1 or not types <= _TYPES:
            raise ValueError(f"the gradients are {sorted(map(str, types))}; give one of fp32, bf16 and fp16 for all")
        if {g.device for g in grads} != {self.device}:
            raise ValueError(f"the parameters lie on {self.device} and not all of their gradients do; move them there")
        found = list(grads)
        for i, (g, known) in enumerate(zip(grads, self.known, strict=True)):
            form = (g.shape, g.stride())
            if form in known:
                continue
            if g.shape != params[i].shape:
                raise ValueError(
                    f"a parameter {tuple(params[i].shape)} has a gradient {tuple(g.shape)}; pair them anew"
                )
            if same_layout(g, params[i]):
                known.add(form)
            else:
                found[i] = torch.empty_like(params[i], dtype=g.dtype).copy_(g)
        return found


def plan(params: Sequence[torch.Tensor], *states: Sequence[torch.Tensor]) -> Plan:
    """The plan of the last call with these tensors if it is still true of them, else a new one."""
    tensors = [*params, *(s for kind in states for s in kind)]
    key = tuple(map(id, tensors))
    found = _plans.get(key)
    if found is None or not found.is_of(tensors):
        _plans.pop(key, None)
        if len(_plans) >= _MOST:
            del _plans[next(iter(_plans))]
        found = _plans[key] = Plan(params, states)
    return found


def _check_states(params: Sequence[torch.Tensor], states: Sequence[torch.Tensor], kind: str) -> None:
    if kind == "average" and not states:
        return
    if len(params) != len(states):
        raise ValueError(f"there are {len(params)} parameters and {len(states)} {kind} tensors; give as many")
    for p, s in zip(params, states, strict=True):
        if s.dtype != torch.float32 or s.device != p.device or not same_layout(s, p):
            raise ValueError(
                f"the {kind} of a parameter {tuple(p.shape)} is {s.dtype} on {s.device} with strides {s.stride()}; "
                f"it must be fp32 on {p.device} and lie as the parameter does, with strides {p.stride()}"
            )


def same_layout(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Do equal positions lie at equal offsets? (The stride of a dimension of one element means nothing.)"""
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    return tensor.shape == like.shape and all(a == b for n, a, b in strides if n > 1)
