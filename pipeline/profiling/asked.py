"""Which steps are to be profiled, as people ask for them."""

import re
from dataclasses import dataclass

from pipeline.errors import UserError

VARIABLE = "NORMFREE_PROFILE"
"""The variable by which a launcher tells its ranks; 'normfree launch' hands it to all hosts."""
WARM_UP = 3
"""Steps before a number of steps is counted: the first ones choose kernels and reserve memory."""
MAX_STEPS = 50
"""A step of NFNet-F0 is some 10,000 events, half a megabyte of trace."""


@dataclass(frozen=True)
class Steps:
    """Numbered as the console does: step k is the k-th update of the run. `first` 0: `last` is a number of steps, counted after
    the warm-up."""

    first: int
    last: int

    def of_run(self, done: int) -> range:
        """Of a start that has done so many steps: the steps that are left to profile, possibly none."""
        if self.first:
            return range(max(self.first, done + 1), self.last + 1)
        return range(done + WARM_UP + 1, done + WARM_UP + self.last + 1)

    def check(self, total_steps: int) -> None:
        """UserError where a run of so many steps never reaches them."""
        last = self.last if self.first else self.last + WARM_UP
        if last > total_steps:
            raise UserError(
                f"--profile {self} asks for step {last:,}, and the run has {total_steps:,}; give steps up to {total_steps:,}"
            )

    def __str__(self) -> str:
        return f"{self.first}:{self.last}" if self.first else str(self.last)


def parse(text: str) -> Steps | None:
    """FIRST:LAST or a number of steps; None of "". UserError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"(?:([1-9][0-9]{0,11}):)?([1-9][0-9]{0,11})", text)
    if match is None:
        raise UserError(
            f"--profile is {text[:40]!r}; write FIRST:LAST, steps as the console numbers them, such as 10:13, or a number of "
            f"steps, counted from the {WARM_UP + 1}th on"
        )
    steps = Steps(int(match[1] or 0), int(match[2]))
    num = steps.last - steps.first + 1 if steps.first else steps.last
    if num < 1:
        raise UserError(f"--profile {text} ends before it begins; write the smaller number first")
    if num > MAX_STEPS:
        raise UserError(f"--profile {text} asks for {num:,} steps; give {MAX_STEPS} at most, a few show all there is")
    return steps
