"""Maps of a network at several resolutions, as detectors read them: the three coarsest that it has, from a stride of 4 up.

Of ResNets, NFNets, ConvNeXt and Swin these are the maps at strides 8, 16 and 32 (C3 to C5 of Lin et al. 2017).
"""

from typing import Any

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.models.backbone import make

MIN_STRIDE, MAX_LEVELS = 4, 3


def levels(found: list[torch.Tensor], px: int) -> list[torch.Tensor]:
    """Of the maps that a network gave for images of `px`, the last of each resolution (N, C, h, w), finest first.

    Raises:
        UserError: they have no rows and columns, there are not two resolutions, or one does not divide the image.
    """
    last: dict[int, torch.Tensor] = {}
    for one in found:
        if one.dim() != 4 or one.shape[2] != one.shape[3]:
            raise UserError(f"its features of shape {tuple(one.shape[1:])} have no rows and columns")
        if one.shape[2] * MIN_STRIDE <= px:
            last[one.shape[2]] = one
    sides = sorted(last, reverse=True)[-MAX_LEVELS:]
    if len(sides) < 2:
        what = f"all of {sides[0]} x {sides[0]}" if sides else f"none of a stride of {MIN_STRIDE} or more"
        raise UserError(f"it has no maps at several resolutions ({what} at {px} px)")
    if any(px % side for side in sides):
        shown = ", ".join(map(str, sides))
        raise UserError(
            f"images of {px} px are no multiple of its maps' sides ({shown}); set image_px to a multiple of 32"
        )
    return [last[side] for side in sides]


def pyramid_of(model: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """(N, 3, px, px) -> (N,) rows of the fields "0", "1", ..., each (C, h, w) float16, finest first."""
    maps = levels(model.forward_intermediates(images), images.shape[-1])  # type: ignore[operator]
    kind = np.dtype([(str(i), np.float16, tuple(m.shape[1:])) for i, m in enumerate(maps)])
    found = np.empty(len(images), kind)
    for name, one in zip(kind.names or (), maps, strict=True):
        found[name] = one.half().cpu().numpy()
    return found


def pyramid_bytes(name: str, options: dict[str, Any], px: int) -> int:
    """Of an image's maps at several resolutions, before the network has weights. UserError where it has none."""
    with torch.device("meta"):
        model = make(name, 2, options).eval()
        try:
            found = levels(model.forward_intermediates(torch.zeros(1, 3, px, px)), px)  # type: ignore[operator]
            return 2 * sum(one.numel() for one in found)
        except (
            UserError,
            RuntimeError,
            ValueError,
            AttributeError,
        ) as error:  # networks for images of one size refuse others in many ways
            reason = str(error).splitlines()[0]
            advice = "" if "set image_px" in reason else "; take a convolutional network or Swin, or leave detect out"
            raise UserError(f"{name} cannot detect: {reason}{advice}") from None
