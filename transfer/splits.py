"""Sealed tests: a task's test split opens only for a selection record that is already written.

A selection record says which hyper-parameters a cell (task, method, init, shots) will use, and how they were chosen:
on the held-out part of the train split, with the support of seed 0. It is written once; what was chosen stays chosen.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from transfer.tasks import Init, Method, Task


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The content of `<sweep>/selection/<task>-<method>-<init>-<shots>.json`."""

    task: str
    method: Method
    init: Init
    shots: int
    hyperparameters: dict[str, Any]
    candidates: list[dict[str, Any]]
    """For each: hyperparameters, score (accuracy on the held-out part, None if it failed), loss, step, status,
    digest."""
    protocol_digest: str
    data_digest: str
    checkpoint_digest: str
    """Empty for a from-scratch cell."""
    time_s: float = field(default_factory=time.time)


@dataclass(frozen=True)
class TestSplit:
    """Permission to read a test split: only `open_test` makes one."""

    __test__ = False  # pytest collects classes by this name

    name: str
    selection_url: str


def selection_url(sweep: str, task: str, method: str, init: str, shots: int) -> str:
    return storage.join(sweep, "selection", f"{task}-{method}-{init}-{shots}.json")


def write_selection(sweep: str, selection: Selection) -> str:
    """Write the record, or find the one that is there; its URL.

    Raises:
        UserError: the record that is there chose something else; a choice is not revised after the test may have been
        read.
    """
    s = selection
    url = selection_url(sweep, s.task, s.method, s.init, s.shots)
    if storage.exists(url):
        there = read_selection(url)
        if (there.hyperparameters, there.protocol_digest) != (s.hyperparameters, s.protocol_digest):
            raise UserError(
                f"{url} has chosen {there.hyperparameters} already, now {s.hyperparameters} would be chosen; "
                "use another sweep folder"
            )
        return url
    storage.write_bytes(url, (json.dumps(asdict(s), indent=1) + "\n").encode())
    return url


def read_selection(url: str) -> Selection:
    """UserError if there is none, or it is not one."""
    try:
        return Selection(**json.loads(storage.read_bytes(url)))
    except FileNotFoundError:
        raise UserError(f"there is no selection record at {url}; without one the test split stays closed") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"{url} is not a selection record ({error}); delete the sweep folder and run the sweep again"
        ) from None


def open_test(task: Task, url: str) -> TestSplit:
    """The test split of `task` for the cell whose selection record lies at `url`.

    Raises:
        UserError: the record does not exist, or was written for another task or other data.
    """
    selection = read_selection(url)
    if (selection.task, selection.data_digest) != (task.name, task.data_digest):
        raise UserError(
            f"{url} was written for {selection.task} with data {selection.data_digest[:12]}, "
            f"not for {task.name} with data {task.data_digest[:12]}; use another sweep folder"
        )
    return TestSplit(task._test_split, url)
