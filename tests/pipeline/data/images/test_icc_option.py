"""Embedded profiles are converted, or ignored as other loaders do: through a picture, a dataset's batches and features' keys."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.images.decode import decode_image, open_picture
from pipeline.data.loading.batches import Pixels
from tests.pipeline.data.images.test_picture import linear_profile
from transfer.probes.features import feature_digest


def picture(kind: str) -> bytes:
    ramp = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, kind, icc_profile=linear_profile(b"RGB "))
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_profile_that_is_ignored_leaves_the_pixels_that_pillow_gives(kind: str) -> None:
    data = picture(kind)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # as torchvision's loader opens it
    for pixels in (
        decode_image(data, convert_icc=False),
        open_picture(data, convert_icc=False).crop((0, 0, 32, 32)),
    ):
        assert np.abs(pixels.astype(int) - plain).max() <= (2 if kind == "JPEG" else 0)
    assert np.abs(decode_image(data).astype(int) - plain).max() > 40  # linear light is no sRGB


def test_batches_follow_the_option_and_features_are_kept_apart() -> None:
    import torch

    augment, made = AugmentConfig(image_px=32), []
    for convert in (True, False):
        made.append(torch.zeros(32, 32, 3, dtype=torch.uint8))
        Pixels(augment, None, convert_icc=convert)(picture("PNG"), made[-1], number=0, view=0, drawn_for=0)
    assert not torch.equal(*made)
    keys = {feature_digest("w", augment, "d", "train", convert_icc=convert) for convert in (True, False)}
    assert len(keys) == 2 and feature_digest("w", augment, "d", "train") in keys
