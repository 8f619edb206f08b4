"""Faults that a process of a drill is told to meet, by the variable NORMFREE_FAULTS: nobody else sets it.

    NORMFREE_FAULTS='[{"rank": 1, "point": "step", "first": 13, "last": 13, "do": "hold", "file": "/tmp/drill/held"}]'

`normfree drill` starts real commands with it. What comes from outside a process (signals, a dead store, a cut file) it does
from outside; this is for what only the process itself can meet, and for standing still where a signal is to find it.
"""

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import documents
from pipeline.documents import Count, Text
from pipeline.errors import UserError
from pipeline.supervision import fault_points
from pipeline.supervision.stop_signals import say

VARIABLE = "NORMFREE_FAULTS"
GO = ".go"
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a rank at a point (`fault_points`), from the `first` to the `last` time in a process."""

    rank: Count
    point: Text
    first: Count
    """Of the steps of this process, the first being 1; at a point of a save, of its saves."""
    last: Count
    do: Literal["hold", "nan", "full"]
    """hold: write the process's number into `file`, which is not there yet, and wait until there is a file FILE.go; once, however
    often the process is started. nan: the step's first micro-batch is not finite. full: the disk has no room."""
    file: Text = ""


def arm(rank: int) -> None:
    """Have this process meet what the variable plans for its rank; nothing without it. UserError for one without a meaning."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    remedy = "unset it: it is for drills"
    planned = documents.parse(text, list[Fault], VARIABLE, remedy=remedy)
    unknown = {fault.point for fault in planned} - {*fault_points.POINTS, fault_points.STEP}
    if unknown:
        raise UserError(f"{VARIABLE} names {sorted(unknown)[0]!r}, which is no point of a run; {remedy}")
    say(f"{VARIABLE} is set: this run is part of a drill, and meets the faults that are planned there")
    fault_points.hook = _Plan([fault for fault in planned if fault.rank == rank])


class _Plan:
    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults, self._steps, self._saves = faults, 0, 0

    def __call__(self, point: str) -> None:
        self._steps += point == fault_points.STEP
        self._saves += point == fault_points.POINTS[0]
        count = self._steps if point == fault_points.STEP else self._saves
        for fault in self._faults:
            if fault.point == point and fault.first <= count <= fault.last:
                _meet(fault)


def _meet(fault: Fault) -> None:
    match fault.do:
        case "hold":
            _hold(Path(fault.file))
        case "nan":
            _poison_next_forward()
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _hold(file: Path) -> None:
    with contextlib.suppress(FileExistsError):
        with file.open("x") as mark:
            mark.write(f"{os.getpid()}\n")
        go = file.with_name(file.name + GO)
        while not go.exists():
            time.sleep(POLL_S)


def _poison_next_forward() -> None:
    """Whatever module runs forward next gets NaN in place of the first floating-point tensor that it is given."""
    from torch import Tensor
    from torch.nn.modules.module import register_module_forward_pre_hook

    def poison(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor) and value.is_floating_point():
                handle.remove()
                return (*arguments[:place], value * float("nan"), *arguments[place + 1 :])
        return None

    handle = register_module_forward_pre_hook(poison)  # type: ignore[arg-type]  # it may return arguments (its docstring)
