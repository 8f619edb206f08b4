"""What an export starts from, and how its answers are compared."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from nfnet.model import NFNet
from pipeline.checkpoint import load
from pipeline.checkpoint.commit import Commit
from pipeline.checkpoint.load import WhichWeights
from pipeline.configuration import from_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import eval_image, normalise
from pipeline.data.images.decode import decode_image
from pipeline.models.backbone import load_backbone, make, typed_options
from pipeline.models.evaluation_options import activation_of

TOLERANCE = 1e-4
"""Of the largest logit. Between two programs in fp32 the sums' order differs; measured are 1e-6 and below."""
PROBE_IMAGES = 4


@dataclass(frozen=True)
class Probe:
    """The fixed batch: images of noise, the same every time, as files and as the network's input."""

    files: list[bytes]
    images: torch.Tensor
    """(N, 3, px, px) float32, normalised."""


@dataclass(frozen=True)
class ExportSource:
    """The checkpoint that is exported."""

    model: nn.Module
    commit: Commit
    weights: str
    """ema or raw."""
    augment: AugmentConfig

    @property
    def px(self) -> int:
        return self.augment.evaluation_px

    @property
    def name(self) -> str:
        return str(self.commit.config["model"]["name"])

    @property
    def options(self) -> dict[str, Any]:
        return typed_options(self.name, self.commit.config["model"]["options"])

    def made_with(self, state: dict[str, torch.Tensor]) -> nn.Module:
        """A network of the same make with other weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            model = make(self.name, len(self.commit.classes), self.options)
        model.load_state_dict(state)
        return model.eval()

    def probe(self) -> Probe:
        # Larger than the input and not square, so that resizing is part of what is compared.
        shape = (PROBE_IMAGES, self.px + self.px // 2, self.px + self.px // 3, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        files = []
        for pixels in noise:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            files.append(buffer.getvalue())
        pixels = np.stack([eval_image(decode_image(file), self.augment) for file in files])
        return Probe(files, normalise(torch.from_numpy(pixels), self.augment, torch.device("cpu")))

    def description(self) -> dict[str, Any]:
        """What a stranger needs to use the weights, and what leads back to where they come from."""
        commit = self.commit
        model = commit.config["model"]
        maker = "nfnet.create_model" if isinstance(self.model, NFNet) else "pipeline.models.backbone.make"
        return {
            "model": {
                "name": model["name"],
                "options": model["options"],
                "num_classes": len(commit.classes),
                "library": f"normfree ({maker})",
            },
            "classes": commit.classes,
            "preprocessing": preprocessing(self.augment),
            "activation": activation_of(commit.config),
            "weights": self.weights,
            "source": {
                "url": commit.url,
                "digest": commit.digest,
                "step": commit.step,
                "samples": commit.samples,
                "num_updates": commit.num_updates,
                "config_digest": commit.config_digest,
                "dataset": commit.dataset,
                "evaluation": commit.evaluation,
            },
        }


Answer = Callable[[Probe], torch.Tensor]
"""Logits (N, classes) computed from the written files alone."""


Writer = Callable[[ExportSource, Path], Answer]
"""Writes into a folder that does not exist yet."""


def open_source(url: str, weights: WhichWeights = "evaluated") -> ExportSource:
    """The checkpoint (a run folder: its newest one; an exported folder too) with its own head, on the CPU."""
    loaded = load_backbone(url, weights)
    commit = load.resolve(loaded.url, load.default_cache())
    kept = "ema" if "ema" in commit.kinds else "raw"
    which = kept if weights == "evaluated" else weights
    augment: AugmentConfig = from_dict(AugmentConfig, commit.config["augment"], "augment")
    return ExportSource(loaded.model, commit, which, augment)


def preprocessing(augment: AugmentConfig) -> dict[str, Any]:
    """How evaluation makes the network's input of an image, for whoever has to do it again.

    `resize_px`: a square of that side where `resize` is "square", else the shorter side; then the centre of `px`.
    """
    return {
        "px": augment.evaluation_px,
        "resize": "shorter side" if augment.eval_resize == "aspect" else "square",
        "resize_px": augment.evaluation_resize_px,
        "interpolation": f"{augment.interpolation}, antialiased",
        "mean": list(augment.mean),
        "std": list(augment.std),
        "input": "float32 (N, 3, px, px), RGB, (value / 255 - mean) / std",
    }
