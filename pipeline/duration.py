"""How long something goes on: given once, in the unit that the user thinks in, resolved to steps at the start."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError

Unit = Literal["epochs", "samples", "steps"]


@dataclass(frozen=True)
class Duration:
    """For example `Duration(20, "epochs")`, written "20 epochs"."""

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        if not self.value >= 0 or not math.isfinite(self.value):
            raise UserError(f"a duration of {self.value} {self.unit} cannot be; give a number of 0 or more")

    def __str__(self) -> str:
        return f"{self.value:.15g} {self.unit}"

    @classmethod
    def parse(cls, text: object, where: str = "duration") -> "Duration":
        """From "20 epochs", "512 steps", "1e6 samples"; units may be singular."""
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*(epoch|sample|step)s?\s*", str(text))
        try:
            value = float(match[1]) if match else None
        except ValueError:
            value = None
        if match is None or value is None:
            raise UserError(
                f"{where} is {text!r}; write a number and a unit, as '20 epochs', '500 steps' or '1e6 samples'"
            )
        return cls(value, f"{match[2]}s")  # type: ignore[arg-type]

    def steps(self, *, samples_per_epoch: int, global_batch: int) -> int:
        """Updates of `global_batch` samples, rounded to the nearest, at least 1 for a positive duration."""
        samples_per_unit = {"epochs": samples_per_epoch, "samples": 1, "steps": global_batch}[self.unit]
        steps = round(self.value * samples_per_unit / global_batch)
        return max(steps, 1) if self.value > 0 else 0
