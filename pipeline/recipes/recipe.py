"""What a recipe is: a function that returns a whole Run, and a header with its command, hardware, hours and result."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.training.run import Run

IMAGENET, JFT_300M, JFT_4B = 1_281_167, 300_000_000, 4_000_000_000
"""Training images that durations in epochs were given for; the JFT sets as the papers round them."""

PREPARE_IMAGENET = "normfree data prepare imagenet --source ILSVRC2012/ --out data/imagenet"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    make: Callable[[], Run]
    header: str
    """First line: what it is; then Command, Hardware, Result, and Choices where the source is silent."""
    num_images: int = IMAGENET
    """Of the training split that its durations are given for."""

    @classmethod
    def of(cls, function: Callable[[], Run], num_images: int) -> "Recipe":
        """One whose header is the function's docstring."""
        return cls(make=function, header=inspect.getdoc(function) or "", num_images=num_images)

    @property
    def summary(self) -> str:
        return self.header.partition("\n")[0]
