"""Clipping and updating of a whole parameter group in a handful of launches; signatures of `plain`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nfnet.kernels import LAUNCH, tables
from nfnet.kernels.plain import MIN_GRADIENT_NORM, UnitNorms, all_finite

_UNITS = 1024
"""That a program of `factors` works on."""


def unit_norms(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> UnitNorms:
    """Units of up to some 10,000 elements are what this is made for: a unit is read by one program."""
    from nfnet.kernels import update_programs as programs

    grads, device = _prepared(params, grads), params[0].device
    layout = tables.layout(tuple(p.shape for p in params), device)
    table = tables.pointers(tuple(t.data_ptr() for ts in (params, grads) for t in ts), device)
    weight_squares, gradient_squares = torch.zeros(2, layout.num_units, device=device)
    num_nonfinite = torch.zeros((), device=device, dtype=torch.int32)
    with torch.cuda.device_of(params[0]):
        for tile in layout.tiles:
            programs.unit_norms[(len(tile.norm_items),)](
                table.addresses,
                layout.sizes,
                tile.norm_items,
                weight_squares,
                gradient_squares,
                num_nonfinite,
                len(params),
                **_constants(grads, table, tile),
            )
    return UnitNorms(weight_squares, gradient_squares, num_nonfinite)


def update_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    clipping: float | None,
    eps: float,
    keep: float,
    grad_scale: float = 1.0,
    norms: UnitNorms | None = None,
    finite: torch.Tensor | None = None,
) -> torch.Tensor:
    from nfnet.kernels import update_programs as programs

    grads, device = _prepared(params, grads), params[0].device
    for kind, states in (("momentum", momenta), ("average", averages)):
        _check_states(params, states, kind)
    layout = tables.layout(tuple(p.shape for p in params), device)
    lists = (params, grads, momenta, averages)
    table = tables.pointers(tuple(t.data_ptr() for ts in lists for t in ts), device)
    num_clipped = torch.zeros((), device=device, dtype=torch.int32)
    gate = None if finite is None else finite.view(torch.uint8)
    with torch.cuda.device_of(params[0]):
        factors = None
        if clipping:
            factors = _factors(norms, gate, num_clipped, clipping, eps, grad_scale)
        for tile in layout.tiles:
            programs.update[(len(tile.update_items),)](
                table.addresses,
                layout.sizes,
                tile.update_items,
                factors,
                gate,
                len(params),
                float(lr),
                float(momentum),
                float(weight_decay),
                float(1 - keep),
                float(grad_scale),
                CLIP=factors is not None,
                AVERAGE=bool(averages),
                GATED=gate is not None,
                CHUNK=tables.CHUNK,
                **_constants(grads, table, tile),
            )
    # Autograd, and whoever keeps something computed from a weight, sees writes by this number alone.
    torch.autograd.graph.increment_version([*params, *momenta, *averages])
    return num_clipped


def _factors(
    norms: UnitNorms | None,
    gate: torch.Tensor | None,
    num_clipped: torch.Tensor,
    clipping: float,
    eps: float,
    grad_scale: float,
) -> torch.Tensor:
    from nfnet.kernels import update_programs as programs

    if norms is None:
        raise ValueError("clipping needs the units' norms; pass norms=unit_norms(params, grads)")
    out = torch.empty_like(norms.gradient_squares)
    programs.factors[(-(-len(out) // _UNITS),)](
        norms.weight_squares,
        norms.gradient_squares,
        gate,
        out,
        num_clipped,
        len(out),
        float(clipping),
        float(eps),
        MIN_GRADIENT_NORM,
        float(grad_scale),
        GATED=gate is not None,
        BLOCK=_UNITS,
        **LAUNCH,
    )
    return out


def _constants(grads: Sequence[torch.Tensor], table: tables.Pointers, tile: tables.Tile) -> dict[str, object]:
    import triton.language as tl

    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {
        "GRAD": types[grads[0].dtype],
        "POINTER_ALIGN": table.align,
        "LENGTH_ALIGN": tile.length_align,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        **LAUNCH,
    }


def _prepared(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients, each laid out as its parameter. Raises ValueError for what the tables cannot express."""
    devices = {t.device for ts in (params, grads) for t in ts}
    types = {g.dtype for g in grads}
    if len(params) != len(grads) or not params:
        raise ValueError(
            f"there are {len(params)} parameters and {len(grads)} gradients; give as many, and at least one"
        )
    if len(devices) > 1:
        raise ValueError(f"parameters and gradients lie on {len(devices)} devices; give one device's at a time")
    if any(p.dtype != torch.float32 for p in params):
        raise ValueError("the update works on fp32 parameters; keep others as fp32 master weights")
    if len(types) > 1 or not types <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f"the gradients are {sorted(map(str, types))}; give one of fp32, bf16 and fp16 for all")
    tables.check_units(params)
    return [
        g if tables.same_layout(g, p) else torch.empty_like(p, dtype=g.dtype).copy_(g)
        for p, g in zip(params, grads, strict=True)
    ]


def _check_states(params: Sequence[torch.Tensor], states: Sequence[torch.Tensor], kind: str) -> None:
    if kind == "average" and not states:
        return
    for p, s in zip(params, states, strict=True):
        if s.dtype != torch.float32 or s.device != p.device or not tables.same_layout(s, p):
            raise ValueError(
                f"the {kind} of a parameter {tuple(p.shape)} is {s.dtype} on {s.device} with strides {s.stride()}; "
                f"it must be fp32 on {p.device} and lie as the parameter does, with strides {p.stride()}"
            )


def clip_and_update_(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    averages: Sequence[torch.Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    clipping: float | None,
    eps: float,
    keep: float,
    grad_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    norms = unit_norms(params, grads)
    num_clipped = update_(
        params,
        grads,
        momenta,
        averages,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        clipping=clipping,
        eps=eps,
        keep=keep,
        grad_scale=grad_scale,
        norms=norms,
        finite=all_finite([norms]),
    )
    total = torch.full_like(norms.num_nonfinite, len(norms.weight_squares))
    return num_clipped, total, norms.num_nonfinite
