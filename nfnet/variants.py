"""The families as data: depths, widths and sizes of every variant.

NFNet: Brock et al. 2021b, table 1 and A.3. NF-ResNet, NF-RegNet: Brock et al. 2021a. Where the papers are silent, the
released code (`base.py`, `nf_resnet.py`, `nf_regnet.py`) decides.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a residual block stands."""

    in_channels: int
    out_channels: int
    stride: int
    index: int
    """In the whole network, from 0."""
    starts_stage: bool


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    family: Literal["nfnet", "nf_resnet", "nf_regnet"] = "nfnet"
    """Decides names in published files; what is built follows from the other fields alone."""
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    """Output channels of each stage."""
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem_widths: tuple[int, ...] = (16, 32, 64, 128)
    stem_strides: tuple[int, ...] = (2, 1, 1, 2)
    stem_kernel: int = 3
    stem_pool: bool = False
    """A 3x3 max pool of stride 2 after the stem."""
    bottleneck: float = 0.5
    """Width of a block's inner convolutions, as a share of its output width (`expansion` 0) ..."""
    expansion: float = 0.0
    """... or, where above 0, as a multiple of its input width (1 for the first block of the network)."""
    group_width: int = 128
    """Channels of a group of the 3x3 convolutions; 0 = they are not grouped."""
    second_3x3: bool = True
    squeeze_excite: Literal["after", "inside", "none"] = "after"
    """After the branch's last convolution, or before it on the inner width."""
    se_ratio: float = 0.5
    shortcut: Literal["pool", "stride"] = "pool"
    """How a shortcut loses resolution: 2x2 average pool and 1x1 convolution, or a strided 1x1 convolution."""
    final_width: int = 0
    """Channels of the last 1x1 convolution; 0 = there is none."""
    activation: str = "gelu"
    head_init: Literal["normal", "zero"] = "normal"
    drop_rate: float = 0.0
    """The published ImageNet recipe's dropout."""
    train_px: int = 224
    test_px: int = 224
    augment_magnitude: int = 0
    """RandAugment's magnitude in the published ImageNet recipe."""
    rounded_bottleneck: bool = False
    """True: inner widths are rounded down to a multiple of the group width, as the released code does."""
    width_divisor: int = 1
    """Widths are multiples of it: of stages, inner convolutions and squeeze-excite (timm: 8)."""

    def squeeze_width(self, channels: int) -> int:
        """Of squeeze-excite's hidden layer."""
        return max(1, _divisible(channels * self.se_ratio, self.width_divisor, least_share=0.0))

    @property
    def num_features(self) -> int:
        return self.final_width or self.widths[-1]

    def positions(self) -> Iterator[Position]:
        """Of all blocks, in order."""
        width, index = self.stem_widths[-1], 0
        for depth, to, stride in zip(self.depths, self.widths, self.strides, strict=True):
            for i in range(depth):
                yield Position(
                    in_channels=width, out_channels=to, stride=1 if i else stride, index=index, starts_stage=i == 0
                )
                width, index = to, index + 1

    def inner_width(self, in_width: int, out_width: int, *, first: bool = False) -> tuple[int, int]:
        """(channels, groups) of the inner convolutions of a block; `first` of the whole network.

        The plus variants' first stage has 384 * 0.5 = 192 inner channels, no multiple of 128. The paper's 527M
        parameters of F4+ need all 192 in one group; the released code rounds down to 128 (525.0M).
        """
        exact = in_width * (1 if first else self.expansion) if self.expansion else out_width * self.bottleneck
        inner = _divisible(exact, self.width_divisor)
        if not self.group_width:
            return inner, 1
        groups = max(1, inner // self.group_width)
        return (groups * self.group_width if self.rounded_bottleneck else inner), groups


_SIZES = {
    0: (192, 256, 0.2, 5),
    1: (224, 320, 0.3, 10),
    2: (256, 352, 0.4, 10),
    3: (320, 416, 0.4, 15),
    4: (384, 512, 0.5, 15),
    5: (416, 544, 0.5, 15),
    6: (448, 576, 0.5, 15),
    7: (480, 608, 0.5, 15),
}


def _nfnets() -> dict[str, Variant]:
    found = {}
    for depth, (train_px, test_px, drop_rate, magnitude) in _SIZES.items():
        for suffix, widths in (("", (256, 512, 1536, 1536)), ("_plus", (384, 768, 2048, 2048))):
            name = f"nfnet_f{depth}{suffix}"
            found[name] = Variant(
                name=name,
                depths=tuple((depth + 1) * n for n in (1, 2, 6, 3)),
                widths=widths,
                stem_widths=(16, 32, 64, widths[0] // 2),
                final_width=2 * widths[-1],
                drop_rate=drop_rate,
                train_px=train_px,
                test_px=test_px,
                augment_magnitude=magnitude,
            )
    return found


_RESNET_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3), 288: (24,) * 4}


def _nf_resnets() -> dict[str, Variant]:
    return {
        f"nf_resnet{layers}": Variant(
            name=f"nf_resnet{layers}",
            family="nf_resnet",
            depths=depths,
            widths=(256, 512, 1024, 2048),
            stem_widths=(64,),
            stem_strides=(2,),
            stem_kernel=7,
            stem_pool=True,
            bottleneck=0.25,
            group_width=0,
            second_3x3=False,
            squeeze_excite="none",
            shortcut="stride",
            activation="relu",
            train_px=224,
            test_px=256,
        )
        for layers, depths in _RESNET_DEPTHS.items()
    }


_REGNETS = {
    0: ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    1: ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    2: ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    3: ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    4: ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    5: ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    6: ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    7: ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    8: ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
}


def _nf_regnets() -> dict[str, Variant]:
    found = {}
    for size, (base_widths, depths, train_px, test_px, drop_rate) in _REGNETS.items():
        widths = tuple(int(w * 0.75) for w in base_widths)
        found[f"nf_regnet_b{size}"] = Variant(
            name=f"nf_regnet_b{size}",
            family="nf_regnet",
            depths=depths,
            widths=widths,
            strides=(2, 2, 2, 2),
            stem_widths=(widths[0],),
            stem_strides=(2,),
            expansion=2.25,
            group_width=8,
            second_3x3=False,
            squeeze_excite="inside",
            final_width=1280 * widths[-1] // 440,
            activation="silu",
            head_init="zero",
            drop_rate=drop_rate,
            train_px=train_px,
            test_px=test_px,
            rounded_bottleneck=True,
        )
    return found


VARIANTS: dict[str, Variant] = {
    **_nfnets(),
    **_nf_resnets(),
    **_nf_regnets(),
    # For CPU work at 32-64 px: total stride 8, so that a 32 px image still has a 4x4 map.
    "nfnet_tiny": Variant(
        name="nfnet_tiny",
        depths=(1, 2, 2),
        widths=(96, 192, 384),
        strides=(1, 2, 2),
        stem_widths=(16, 32, 64),
        stem_strides=(1, 1, 2),
        group_width=48,
        final_width=768,
        activation="silu",
        train_px=32,
        test_px=32,
    ),
    "nf_resnet_tiny": replace(
        _nf_resnets()["nf_resnet50"],
        name="nf_resnet_tiny",
        depths=(1, 1, 2),
        widths=(64, 128, 256),
        strides=(1, 2, 2),
        stem_widths=(16,),
        stem_strides=(1,),
        train_px=32,
        test_px=32,
    ),
    "nf_regnet_tiny": replace(
        _nf_regnets()["nf_regnet_b0"],
        name="nf_regnet_tiny",
        depths=(1, 1, 2),
        widths=(24, 48, 96),
        strides=(1, 2, 2),
        stem_widths=(24,),
        final_width=256,
        train_px=32,
        test_px=32,
    ),
}


def _divisible(width: float, divisor: int, *, least_share: float = 0.9) -> int:
    """The nearest multiple, but never less than `least_share` of the width; the whole part for a divisor of 1."""
    if divisor == 1:
        return int(width)
    nearest = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return nearest if nearest >= least_share * width else nearest + divisor


def get_variant(name: str) -> Variant:
    """By name; `nfnet_f4+` is `nfnet_f4_plus`, timm's `dm_nfnet_f0` is `nfnet_f0`. ValueError has the nearest names."""
    key = name.lower().replace("+", "_plus").removeprefix("dm_")
    if key not in VARIANTS:
        near = difflib.get_close_matches(key, VARIANTS, n=3, cutoff=0.4)
        raise ValueError(f"no model {name!r}; the nearest names are {', '.join(near or sorted(VARIANTS))}")
    return VARIANTS[key]


def adjust(
    variant: Variant,
    *,
    rounded_bottleneck: bool | None = None,
    shortcut: Literal["pool", "stride"] | None = None,
    width_divisor: int = 1,
    widths: tuple[int, ...] | None = None,
    second_3x3: bool | None = None,
) -> Variant:
    """The variant with other conventions of its sizes; None keeps what it has. Raises ValueError for unknown ones.

    Args:
        widths: of the stages; the last convolution, where there is one, has twice the last of them, as NFNets have it.
    """
    if shortcut not in (None, "pool", "stride"):
        raise ValueError(f"shortcut is {shortcut!r}; choose pool or stride")
    if rounded_bottleneck is not None:
        variant = replace(variant, rounded_bottleneck=rounded_bottleneck)
    if second_3x3 is not None:
        variant = replace(variant, second_3x3=second_3x3)
    if widths is not None:
        if len(widths) != len(variant.widths):
            raise ValueError(
                f"widths has {len(widths)} entries; {variant.name} has {len(variant.widths)} stages, so give as many"
            )
        final_width = 2 * widths[-1] if variant.final_width else 0
        variant = replace(variant, widths=tuple(widths), final_width=final_width)
    if width_divisor > 1:
        variant = replace(
            variant,
            width_divisor=width_divisor,
            widths=tuple(_divisible(w, width_divisor) for w in variant.widths),
            stem_widths=tuple(_divisible(w, width_divisor) for w in variant.stem_widths),
        )
    return replace(variant, shortcut=shortcut or variant.shortcut)
