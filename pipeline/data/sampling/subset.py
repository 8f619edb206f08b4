"""Parts of a split: few images of each class or all of them, and a part held out to choose hyper-parameters on.

Law: for one split, every support set (any seed, any number of shots) is disjoint from the held-out part, and the support
for fewer shots is contained in the support for more shots with the same seed.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.configuration import check_fields
from pipeline.data.sampling.order import permutation
from pipeline.errors import UserError
from pipeline.field_types import CountOrZero, ShareBelowOne


@dataclass(frozen=True, kw_only=True)
class Subset:
    per_class: CountOrZero
    """Images of each class in the support (ignored for the held-out part); 0 = all that are not held out."""
    seed: CountOrZero = 0
    """Draws the support; the held-out part does not depend on it."""
    holdout_per_class: CountOrZero = 0
    """Images of each class that no support has."""
    part: Literal["support", "holdout"] = "support"
    """Which of the two this is."""
    holdout_share: ShareBelowOne = 0.0
    """Of each class, rounded, at least one image; in place of holdout_per_class."""
    listed: tuple[CountOrZero, ...] = ()
    """These samples, by their place in the split's index, and nothing else: a published list."""

    def __post_init__(self) -> None:
        check_fields(self, "subset")


def select(labels: np.ndarray, subset: Subset) -> np.ndarray:
    """Sorted sample indices (int64) of the subset.

    Args:
        labels: (num_samples,) class of each sample of the split.
    Raises:
        UserError: a class has fewer images than the held-out part and the support need together.
    """
    if subset.listed:
        listed = np.sort(np.asarray(subset.listed, np.int64))
        if listed[0] < 0 or listed[-1] >= len(labels) or len(np.unique(listed)) != len(listed):
            raise UserError(f"a list of {len(listed)} samples does not fit a split of {len(labels)}; prepare it again")
        return listed
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        num_held = subset.holdout_per_class
        if subset.holdout_share:
            num_held = max(1, round(len(members) * subset.holdout_share))
        needed = num_held + (max(subset.per_class, 1) if subset.part == "support" else 0)
        if len(members) < needed:
            raise UserError(
                f"class {int(label)} has {len(members)} images, but {subset.per_class} shots and "
                f"{num_held} held out need {needed}; ask for fewer shots or hold out fewer"
            )
        members = members[permutation(len(members), 0x40, int(label))]
        held_out, rest = members[:num_held], members[num_held:]
        if subset.part == "holdout":
            chosen.append(held_out)
        else:
            drawn = rest[permutation(len(rest), 0x41, subset.seed, int(label))]
            chosen.append(drawn[: subset.per_class] if subset.per_class else drawn)
    return np.sort(np.concatenate(chosen)).astype(np.int64)
