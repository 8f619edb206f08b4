"""What a run does about updates that are not finite: leaves each out, after three in a row goes back, at a fourth stops.

To go back is to restore the newest checkpoint that verifies and to leave out, on the way, the data of the three updates. What
was left out is written to `left_out.json` in the run's folder, so that every later start leaves it out too: the run goes on as
if `data.skip_steps` had named these data from the beginning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import distributed, documents
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.storage import objects
from pipeline.training.run import Run

NAME = "left_out.json"
MAX_IN_A_ROW = 3


@dataclass
class Trouble:
    """Updates in a row that were not finite. Equal on all ranks, since it follows from what they agree on."""

    steps: list[int] = field(default_factory=list)
    """In a row, as steps of the run; those before a rollback stay until the run has got past them."""
    went_back_to: str | None = None
    """URL of the checkpoint of the last rollback."""
    new_from: int = 0
    """Step from which, since then, the data are others than before."""

    def applied(self, step: int) -> None:
        """An update before `new_from` repeats one that had been well, and proves nothing."""
        if step >= self.new_from:
            self.steps.clear()

    def left_out(self, step: int) -> None:
        """UserError for the first one after a rollback that the run has not got past: going back does not help."""
        self.steps.append(step)
        if len(self.steps) > MAX_IN_A_ROW:
            raise UserError(
                f"the update of step {step} was not finite, after {MAX_IN_A_ROW} others and going back to {self.went_back_to} "
                f"without their data; lower optim.learning_rate or optim.clipping in a run of its own folder, or look at the "
                f"data that {NAME} names"
            )

    @property
    def is_too_much(self) -> bool:
        return len(self.steps) == MAX_IN_A_ROW

    def went_back(self, url: str, new_from: int) -> None:
        self.went_back_to, self.new_from = url, new_from


def with_left_out(run: Run, out: str, me: World) -> Run:
    """The run without the data that earlier attempts in its folder left out; rank 0 reads for all."""
    return without(run, distributed.from_main(me, lambda: [row["steps"] for row in read(out)]))


def without(run: Run, ranges: Iterable[str]) -> Run:
    """The run with more ranges of data steps, "FIRST:END", left out."""
    return replace(run, data=replace(run.data, skip_steps=joined([*run.data.skip_steps, *ranges])))


def joined(ranges: Iterable[str]) -> tuple[str, ...]:
    """Ranges "FIRST:END" in order, those that touch or overlap made one."""
    found: list[list[int]] = []
    for first, end in sorted(tuple(map(int, text.split(":"))) for text in ranges):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([first, end])
    return tuple(f"{first}:{end}" for first, end in found)


def read(out: str) -> list[dict[str, Any]]:
    """Rows of steps ("FIRST:END" of the data), reason, checkpoint, keys; none where nothing was left out."""
    url = objects.join(out, NAME)
    try:
        content = documents.read(url, list[dict[str, Any]], remedy="restore it, or delete it to use those data")
        joined(row["steps"] for row in content)
    except FileNotFoundError:
        return []
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{url} does not list what the run left out ({error}); restore it, or delete it to use those data"
        ) from None
    return content


def write(out: str, row: dict[str, Any]) -> None:
    objects.write_bytes(objects.join(out, NAME), (json.dumps([*read(out), row], indent=1) + "\n").encode())
