"""Clipping and updating of a whole parameter group in a handful of launches; signatures of `plain`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nfnet.kernels import LAUNCH, tables
from nfnet.kernels.reference import MIN_GRADIENT_NORM, UnitNorms, all_finite
from nfnet.kernels.tensor_lists import plan

_UNITS = 1024
"""That a program of `factors` works on."""


def unit_norms(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> UnitNorms:
    """Units of up to some 10,000 elements are what this is made for: a unit is read by one program."""
    from nfnet.kernels import triton_update_kernels as programs

    known = plan(params)
    grads = known.gradients(params, grads)
    layout, device = known.layout, known.device
    table = tables.pointers((*known.addresses, *(g.data_ptr() for g in grads)), device)
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
    norms: UnitNorms | None = None,
    finite: torch.Tensor | None = None,
) -> torch.Tensor:
    from nfnet.kernels import triton_update_kernels as programs

    known = plan(params, momenta, averages)
    grads = known.gradients(params, grads)
    layout, device, num = known.layout, known.device, len(params)
    addresses = (*known.addresses[:num], *(g.data_ptr() for g in grads), *known.addresses[num:])
    table = tables.pointers(addresses, device)
    num_clipped = torch.zeros((), device=device, dtype=torch.int32)
    gate = None if finite is None else finite.view(torch.uint8)
    with torch.cuda.device_of(params[0]):
        factors = None
        if clipping:
            factors = _factors(norms, gate, num_clipped, clipping, eps)
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
) -> torch.Tensor:
    from nfnet.kernels import triton_update_kernels as programs

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
        norms=norms,
        finite=all_finite([norms]),
    )
    total = torch.full_like(norms.num_nonfinite, len(norms.weight_squares))
    return num_clipped, total, norms.num_nonfinite
