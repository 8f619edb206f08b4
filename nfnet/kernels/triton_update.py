"""Norms and updates of a whole parameter group in a handful of launches; signatures of `reference`."""

from collections.abc import Sequence

import torch

from nfnet.kernels import LAUNCH
from nfnet.kernels.reference import Rates, Tensors
from nfnet.kernels.tensor_lists import CHUNK, Pointers, Tile, layout, plan, pointers


def square_sums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `reference.square_sums`, of dense tensors of one type on one device. A unit is read by one program, which is made
    for units of up to some 10,000 elements."""
    from nfnet.kernels import triton_update_kernels as kernels

    device = tensors[0].device
    places = layout(tuple(t.shape for t in tensors), device)
    table = pointers(tuple(t.data_ptr() for t in tensors), device)
    sums = torch.zeros(places.num_units, device=device)
    with torch.cuda.device_of(tensors[0]):
        for tile in places.tiles:
            kernels.square_sums[(len(tile.norm_items),)](
                table.addresses, places.sizes, tile.norm_items, sums, len(tensors), **_constants(tensors, table, tile)
            )
    return sums


def update_(
    params: Tensors,
    grads: Tensors,
    momenta: Tensors,
    averages: Tensors,
    rates: Rates,
    factors: torch.Tensor | None = None,
) -> None:
    from nfnet.kernels import triton_update_kernels as kernels

    known = plan(params, momenta, averages)
    grads = known.gradients(params, grads)
    places, num = known.layout, len(params)
    addresses = (*known.addresses[:num], *(g.data_ptr() for g in grads), *known.addresses[num:])
    table = pointers(addresses, known.device)
    with torch.cuda.device_of(params[0]):
        for tile in places.tiles:
            kernels.update[(len(tile.update_items),)](
                table.addresses,
                places.sizes,
                tile.update_items,
                factors,
                len(params),
                *map(float, (rates.lr, rates.momentum, rates.weight_decay, 1 - rates.keep)),
                SCALE=factors is not None,
                AVERAGE=bool(averages),
                CHUNK=CHUNK,
                **_constants(grads, table, tile),
            )
    # Autograd, and whoever keeps something computed from a weight, sees writes by this number alone.
    torch.autograd.graph.increment_version([*params, *momenta, *averages])


def _constants(tensors: Sequence[torch.Tensor], table: Pointers, tile: Tile) -> dict[str, object]:
    import triton.language as tl

    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {
        "TYPE": types[tensors[0].dtype],
        "POINTER_ALIGN": table.align,
        "LENGTH_ALIGN": tile.length_align,
        "ROWS": tile.rows,
        "BLOCK": tile.block,
        **LAUNCH,
    }
