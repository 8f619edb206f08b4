"""The families as data: depths, widths and sizes of every variant (Brock et al. 2021, table 1 and A.3; `base.py`)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    """Output channels of each stage."""
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem_widths: tuple[int, ...] = (16, 32, 64, 128)
    stem_strides: tuple[int, ...] = (2, 1, 1, 2)
    bottleneck: float = 0.5
    """Width of a block's inner convolutions, as a share of its output width."""
    group_width: int = 128
    se_ratio: float = 0.5
    final_width: int = 0
    """Channels of the last 1x1 convolution; 0 = twice the last stage."""
    activation: str = "gelu"
    drop_rate: float = 0.0
    train_px: int = 224
    test_px: int = 224
    augment_magnitude: int = 0
    """RandAugment's magnitude in the published ImageNet recipe."""
    rounded_bottleneck: bool = False
    """True: inner widths are rounded down to a multiple of the group width, as the released code does."""

    @property
    def num_features(self) -> int:
        return self.final_width or 2 * self.widths[-1]

    def inner_width(self, width: int) -> tuple[int, int]:
        """(channels, groups) of the grouped convolutions of a block with this output width.

        The plus variants' first stage has 384 * 0.5 = 192 inner channels, no multiple of 128. The paper's 527M
        parameters of F4+ need all 192 in one group; the released code rounds down to 128 (525.0M).
        """
        inner = int(width * self.bottleneck)
        groups = max(1, inner // self.group_width)
        return (groups * self.group_width if self.rounded_bottleneck else inner), groups


_DEPTHS = {d: tuple((d + 1) * n for n in (1, 2, 6, 3)) for d in range(8)}
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


def _family() -> dict[str, Variant]:
    found = {}
    for depth, (train_px, test_px, drop_rate, magnitude) in _SIZES.items():
        for suffix, widths in (("", (256, 512, 1536, 1536)), ("_plus", (384, 768, 2048, 2048))):
            name = f"nfnet_f{depth}{suffix}"
            found[name] = Variant(
                name=name,
                depths=_DEPTHS[depth],
                widths=widths,
                stem_widths=(16, 32, 64, widths[0] // 2),
                drop_rate=drop_rate,
                train_px=train_px,
                test_px=test_px,
                augment_magnitude=magnitude,
            )
    return found


VARIANTS: dict[str, Variant] = {
    **_family(),
    # For CPU work at 32-64 px: total stride 8, so that a 32 px image still has a 4x4 map.
    "nfnet_tiny": Variant(
        name="nfnet_tiny",
        depths=(1, 2, 2),
        widths=(96, 192, 384),
        strides=(1, 2, 2),
        stem_widths=(16, 32, 64),
        stem_strides=(1, 1, 2),
        group_width=48,
        activation="silu",
        train_px=32,
        test_px=32,
    ),
}


def get_variant(name: str) -> Variant:
    """By name; `nfnet_f4+` is `nfnet_f4_plus`. Raises ValueError with the nearest names."""
    key = name.lower().replace("+", "_plus")
    if key not in VARIANTS:
        near = difflib.get_close_matches(key, VARIANTS, n=3, cutoff=0.4)
        raise ValueError(f"no model {name!r}; the nearest names are {', '.join(near or sorted(VARIANTS))}")
    return VARIANTS[key]
