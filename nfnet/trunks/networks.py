"""Trunks by name, in a tiny size for 32 to 64 px and in full size; `create` makes one with a method."""

import difflib
from dataclasses import fields, replace
from typing import Any

from nfnet.normalizers.method import Method
from nfnet.normalizers.registry import make_method
from nfnet.trunks.binary import BinaryShape, BinaryTrunk
from nfnet.trunks.chain import ChainShape, ChainTrunk
from nfnet.trunks.inception import InceptionShape, InceptionTrunk
from nfnet.trunks.residual import ResidualTrunk, Shape
from nfnet.trunks.trunk import Trunk, TrunkOptions
from nfnet.variants import VARIANTS, Variant

AnyShape = Shape | ChainShape | InceptionShape | BinaryShape


def _shape(name: str, variant: Variant, **changes: Any) -> Shape:
    given = {f.name: getattr(variant, f.name) for f in fields(Variant)}
    return Shape(**{**given, **changes, "name": name})


def _se_resnext_d(name: str, variant: Variant) -> Shape:
    """What NFNet starts from: the usual widths, one 3x3 convolution a block (Brock et al. 2021b, table 2)."""
    first = variant.widths[0]
    widths = tuple(first * 2**i for i in range(len(variant.widths)))
    return _shape(name, variant, widths=widths, final_width=2 * widths[-1], second_3x3=False, padding="same")


_RESNET = VARIANTS["nf_resnet50"]
_SMALL: dict[str, Any] = {"stem_kernel": 3, "stem_pool": False, "stem_strides": (2,), "train_px": 32, "test_px": 32}

SHAPES: dict[str, AnyShape] = {
    "resnet50_v2": _shape("resnet50_v2", _RESNET),
    "resnet_v2_tiny": _shape(
        "resnet_v2_tiny",
        _RESNET,
        **_SMALL,
        depths=(1, 1, 1),
        widths=(32, 64, 128),
        strides=(1, 2, 2),
        stem_widths=(32,),
        basic=True,
    ),
    "resnet_v2_deep": _shape(
        "resnet_v2_deep", _RESNET, **_SMALL, depths=(40,), widths=(16,), strides=(1,), stem_widths=(16,), basic=True
    ),
    "se_resnext_d": _se_resnext_d("se_resnext_d", VARIANTS["nfnet_f0"]),
    "se_resnext_d_tiny": _se_resnext_d("se_resnext_d_tiny", VARIANTS["nfnet_tiny"]),
    "nfnet_f0": _shape("nfnet_f0", VARIANTS["nfnet_f0"], padding="same"),
    "nfnet_tiny": _shape("nfnet_tiny", VARIANTS["nfnet_tiny"], padding="same"),
    "inception_v2": InceptionShape(),
    "inception_tiny": InceptionShape(multiplier=0.25, small_stem=True, blocks=(0, 2, 3, 7, 8), train_px=32),
    "vgg_a": ChainShape(stages=((64,), (128,), (256, 256), (512, 512), (512, 512)), hidden=(4096, 4096)),
    "vgg_tiny": ChainShape(stages=((32, 32), (64, 64), (128, 128)), train_px=32),
    "reactnet_a": BinaryShape(
        widths=(64, *[128] * 2, *[256] * 2, *[512] * 6, *[1024] * 2), strides=(1, 2, 1, 2, 1, 2, *[1] * 5, 2, 1)
    ),
    "reactnet_tiny": BinaryShape(widths=(64, 64, 128, 128), strides=(2, 1, 2, 1), train_px=32),
}
TRUNK_OPTIONS = tuple(f.name for f in fields(TrunkOptions))
SHAPE_OPTIONS = ("depths", "widths", "second_3x3", "basic", "shortcut")
"""Of residual trunks: the path from SE-ResNeXt-D to NFNet, and the depth of small ones."""


BINARY_OPTIONS = ("binary_weights", "binary_gain")


def list_trunks() -> list[str]:
    return sorted(SHAPES)


def get_shape(name: str) -> AnyShape:
    """ValueError has the nearest names."""
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=3, cutoff=0.4)
        raise ValueError(f"no trunk {name!r}; the nearest names are {', '.join(near or sorted(SHAPES))}")
    return SHAPES[name]


def create(name: str, num_classes: int = 1000, *, method: str | Method = "batch_norm", **options: Any) -> Trunk:
    """A trunk by name with fresh weights.

    Args:
        num_classes: 0 for pooled features instead of logits.
        method: name of one of `nfnet.normalizers.registry.list_methods()`, or one that is made.
        options: `in_chans`, `activation`, `drop_rate`, `stochastic_depth`, `head_init`; of residual trunks also `depths`,
            `widths`, `second_3x3`, `basic`, `shortcut`; of binary ones `binary_weights`, `binary_gain`; and the settings of
            the method.
    Raises:
        ValueError: an unknown name or option, or a method that the trunk cannot take.
    """
    shape = get_shape(name)
    own = TrunkOptions(**{k: options.pop(k) for k in TRUNK_OPTIONS if k in options})
    changes = {k: options.pop(k) for k in SHAPE_OPTIONS if k in options}
    binary = {k: options.pop(k) for k in BINARY_OPTIONS if k in options}
    made = make_method(method, **options) if isinstance(method, str) else method
    if changes and not isinstance(shape, Shape):
        raise ValueError(f"{name} is no residual trunk and has no option {sorted(changes)[0]}")
    if isinstance(shape, BinaryShape):
        return BinaryTrunk(shape, num_classes, made, own, **binary)
    if binary:
        raise ValueError(f"{name} is no binary trunk and has no option {sorted(binary)[0]}")
    if isinstance(shape, Shape):
        return ResidualTrunk(_changed(shape, changes), num_classes, made, own)
    if isinstance(shape, ChainShape):
        return ChainTrunk(shape, num_classes, made, own)
    return InceptionTrunk(shape, num_classes, made, own)


def _changed(shape: Shape, changes: dict[str, Any]) -> Shape:
    if "widths" in changes:
        changes = {**changes, "widths": tuple(changes["widths"])}
        if shape.final_width:
            changes["final_width"] = 2 * changes["widths"][-1]
    if "depths" in changes:
        changes["depths"] = tuple(changes["depths"])
    for key in ("widths", "depths"):
        if len(changes.get(key, shape.strides)) != len(shape.strides):
            raise ValueError(f"{key} has {len(changes[key])} entries; {shape.name} has {len(shape.strides)} stages")
    return replace(shape, **changes)
