"""Trunks with any method of normalisation, or none, as networks of a run: `trunk:NAME` with the option `method`.

normfree pretrain RECIPE --model.name trunk:resnet50_v2 --model.options '{method: group_norm, groups: 16}'
"""

import typing
from typing import Any, Literal

from torch import nn

from nfnet.layers import FUNCTIONS
from nfnet.normalizers.registry import get_method, list_methods
from nfnet.trunks.networks import create
from nfnet.trunks.trunk import Trunk
from pipeline.configuration import convert, nearest
from pipeline.errors import UserError
from pipeline.field_types import Count, Positive, ShareBelowOne

PREFIX = "trunk:"
OPTION_TYPES: dict[str, Any] = {
    "method": Literal[*list_methods()],
    "in_chans": Count,
    "activation": Literal[*sorted(FUNCTIONS)] | None,
    "drop_rate": ShareBelowOne,
    "stochastic_depth": ShareBelowOne,
    "head_init": Literal["normal", "zero"],
    "depths": tuple[Count, ...],
    "widths": tuple[Count, ...],
    "second_3x3": bool,
    "basic": bool,
    "shortcut": Literal["pool", "stride"],
    "binary_weights": bool,
    "binary_gain": Positive,
}
"""Of every trunk, besides the settings of its method."""


def is_trunk(name: str) -> bool:
    return name.startswith(PREFIX)


def typed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the types that trunk and method take, from text too. UserError for those that they do not have."""
    method = convert(OPTION_TYPES["method"], options.get("method", "batch_norm"), "model.options.method")
    types = {**_setting_types(method), **OPTION_TYPES}
    for key in options:
        if key not in types:
            raise UserError(f"model.options has no {key!r} with the method {method}; {nearest(key, types)}")
    return {key: convert(types[key], value, f"model.options.{key}") for key, value in options.items()}


def _setting_types(method: str) -> dict[str, Any]:
    found = typing.get_type_hints(get_method(method), include_extras=True)
    return {k: v for k, v in found.items() if typing.get_origin(v) is not typing.ClassVar}


def make(name: str, num_classes: int, options: dict[str, Any]) -> Trunk:
    """`trunk:NAME` with fresh weights. UserError for an unknown name, or what trunk and method cannot do together."""
    try:
        return create(name.removeprefix(PREFIX), num_classes, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}") from None


def check_batch(network: nn.Module, micro_batch: int) -> None:
    """UserError if the network's method cannot take so many samples a forward pass."""
    if isinstance(network, Trunk):
        try:
            network.method.check_batch(micro_batch)
        except ValueError as error:
            raise UserError(f"{network.method.name}: {error}") from None
