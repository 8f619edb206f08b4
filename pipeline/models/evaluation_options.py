"""What evaluation may do with a trained network besides one look at each image: several views, and a temperature.

views         the mean of the class probabilities over an image and its mirror image, and over its four corners and centre
              (Krizhevsky et al. 2012, section 4.1)
temperature   one number that logits are divided by, fitted on held-out data (Guo et al. 2017, section 4.2); the ranking of
              classes, and with it accuracy, stays
classes       of a data set with some of the network's classes (ImageNet-A and R): the choice is among these
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError

NUM_CROPS = (1, 5)
MARGIN = 0.875
"""Share of a side that a crop keeps where the preprocessing itself keeps all of it."""
_LOWEST, _HIGHEST, _ROUNDS = 1e-2, 1e2, 100


def activation_of(config: dict[str, Any]) -> Literal["softmax", "sigmoid"]:
    """What makes probabilities of a network's logits, by the configuration of its run: `optim.loss: binary` trains each class by
    itself, and their probabilities do not add up to 1."""
    return "sigmoid" if config.get("optim", {}).get("loss") == "binary" else "softmax"


class Views(nn.Module):
    """A network over several views of each image."""

    def __init__(self, network: nn.Module, px: int, *, flip: bool, crops: int) -> None:
        super().__init__()
        self.network, self.px, self.flip, self.crops = network, px, flip, crops

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, P, P), P at least `px` -> (N, C): logarithms of the mean probabilities, which serve as logits."""
        views = list(self._crops(images))
        if self.flip:
            views += [view.flip(-1) for view in views]
        shares = torch.stack([self.network(view).float().log_softmax(-1) for view in views])
        return shares.logsumexp(0) - math.log(len(views))

    def _crops(self, images: torch.Tensor) -> list[torch.Tensor]:
        px, more = self.px, images.shape[-1] - self.px
        corners = [(0, 0), (0, more), (more, 0), (more, more)] if self.crops == 5 else []
        return [images[..., y : y + px, x : x + px] for y, x in [(round(more / 2),) * 2, *corners]]


class OfClasses(nn.Module):
    """A network that chooses among some of its classes."""

    def __init__(self, network: nn.Module, columns: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> logits (N, classes chosen)."""
        logits: torch.Tensor = self.network(images)
        return logits[:, self.get_buffer("columns")]


def with_views(
    network: nn.Module, augment: AugmentConfig, *, flip: bool, crops: int
) -> tuple[nn.Module, AugmentConfig]:
    """The network over its views, and the preprocessing that leaves room for them: what its own resizes to, uncropped."""
    if crops not in NUM_CROPS:
        raise UserError(f"--crops is {crops}; choose one of {', '.join(map(str, NUM_CROPS))}")
    if crops == 1:
        return (Views(network, augment.evaluation_px, flip=flip, crops=1) if flip else network), augment
    px = augment.evaluation_px
    larger = math.floor(px / MARGIN) if augment.eval_resize == "plain" else augment.evaluation_resize_px
    if larger <= px:
        raise UserError(f"--crops {crops} needs a margin, and the preprocessing keeps the whole image; leave it out")
    kind: Literal["aspect", "plain"] = "aspect" if augment.eval_resize == "aspect" else "plain"
    return Views(network, px, flip=flip, crops=crops), replace(augment, eval_px=larger, eval_resize=kind, eval_crop=1.0)


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature of the least mean cross-entropy, of logits (N, C) and labels (N,) of held-out images.

    The cross-entropy of z / T is convex in 1 / T, so its one minimum is found by bisection of the slope.

    Raises:
        UserError: every image is classified rightly, or nothing is learnt: the best temperature is then 0 or without bound.
    """
    logits, rows = logits.double(), torch.arange(len(labels))

    def slope(inverse: float) -> float:
        shares = (inverse * logits).softmax(-1)
        return float(((shares * logits).sum(-1) - logits[rows, labels]).mean())

    low, high = 1 / _HIGHEST, 1 / _LOWEST
    if slope(low) >= 0 or slope(high) <= 0:
        raise UserError(
            f"no temperature from {_LOWEST:g} to {_HIGHEST:g} is best on these {len(labels)} images: they are all right, or no "
            "better than chance; fit it on more images"
        )
    for _ in range(_ROUNDS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)
