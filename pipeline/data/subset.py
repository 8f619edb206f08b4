"""Few images of each class: the support of a few-shot task, and a part held out to choose hyper-parameters on.

Law: for one split, every support set (any seed, any number of shots) is disjoint from the held-out part, and the support
for fewer shots is contained in the support for more shots with the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.data.order import permutation
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Subset:
    per_class: int
    """Images of each class in the support (ignored for the held-out part)."""
    seed: int = 0
    """Draws the support; the held-out part does not depend on it."""
    holdout_per_class: int = 0
    part: Literal["support", "holdout"] = "support"


def select(labels: np.ndarray, subset: Subset) -> np.ndarray:
    """Sorted sample indices (int64) of the subset.

    Args:
        labels: (num_samples,) class of each sample of the split.
    Raises:
        UserError: a class has fewer images than the held-out part and the support need together.
    """
    needed = subset.holdout_per_class + (subset.per_class if subset.part == "support" else 0)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < needed:
            raise UserError(
                f"class {int(label)} has {len(members)} images, but {subset.per_class} shots and "
                f"{subset.holdout_per_class} held out need {needed}; ask for fewer shots or hold out fewer"
            )
        members = members[permutation(len(members), 0x40, int(label))]
        held_out, rest = members[: subset.holdout_per_class], members[subset.holdout_per_class :]
        if subset.part == "holdout":
            chosen.append(held_out)
        else:
            chosen.append(rest[permutation(len(rest), 0x41, subset.seed, int(label))][: subset.per_class])
    return np.sort(np.concatenate(chosen)).astype(np.int64)
