"""Sealed tests: a task's test split opens only for a selection record that is already written, and every opening is recorded.

A selection record says which hyper-parameters a cell (task, method, backbone, init, shots) will use, and how they were chosen:
on the held-out part of the train split, with the support of seed 0. It is written once; what was chosen stays chosen.

    <sweep>/selection/<name>.json                    `Selection`
    <sweep>/openings/<trial digest>-<time>.json      `Opening`: one for each time that a trial was given the test split
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypedDict

from pipeline import documents
from pipeline.documents import Share, Text
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.protocol.imagenet_labels import OtherTestSet
from transfer.protocol.tasks import Init, Task

REMEDY = "restore it, or run the sweep again in another folder: a choice is not made twice"


class GridRow(TypedDict):
    """A point of a probe's grid, with its metric on the held-out part."""

    hyperparameters: dict[str, Any]
    score: Share


class Candidate(TypedDict):
    """A point that was compared: the protocol's metric on the held-out part (None if it failed), and the trial that gave it."""

    hyperparameters: dict[str, Any]
    score: float | None
    loss: float | None
    step: int
    status: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The content of a selection record."""

    task: Text
    method: Text
    """Its name in the suite."""
    init: Init
    shots: int
    hyperparameters: dict[str, Any]
    candidates: list[Candidate]
    protocol_digest: Text
    data_digest: Text
    checkpoint_digest: Text
    """Empty for a from-scratch cell."""
    backbone_digest: Text = ""
    """Of the architecture and its preprocessing."""
    rule: Text = ""
    """How it was chosen, in a sentence."""
    time_s: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One time that a trial was given a test split."""

    task: Text
    data_digest: Text
    trial: Text
    """Digest of the trial."""
    protocol_digest: Text
    selection_url: Text
    selection_sha256: Text
    time_s: float
    what: Text = "test"
    """Which images: the task's own test split, or another dataset that it is measured on as well."""


@dataclass(frozen=True)
class TestSplit:
    """Permission to read a test split: only `open_test` makes one."""

    __test__ = False  # pytest collects classes by this name

    name: str
    selection_url: str


def selection_name(task: str, method: str, init: str, shots: int, key: str) -> str:
    """`key`: first digits of the digest of the weights, or from scratch of the architecture."""
    return f"{task}-{method}-{init}-{shots}-{key}"


def selection_url(sweep: str, name: str) -> str:
    return objects.join(sweep, "selection", f"{name}.json")


def write_selection(url: str, selection: Selection) -> str:
    """Write the record, or find the one that is there; its URL.

    Raises:
        UserError: the record that is there chose something else; a choice is not revised after the test may have been
        read.
    """
    s = selection
    if objects.exists(url):
        there = read_selection(url)
        if (there.hyperparameters, there.protocol_digest) != (s.hyperparameters, s.protocol_digest):
            raise UserError(
                f"{url} has chosen {there.hyperparameters} already, now {s.hyperparameters} would be chosen; "
                "use another sweep folder"
            )
        return url
    objects.write_bytes(url, (json.dumps(asdict(s), indent=1) + "\n").encode())
    return url


def read_selection(url: str) -> Selection:
    """UserError if there is none, or it is not one."""
    try:
        return documents.read(url, Selection, remedy=REMEDY)
    except FileNotFoundError:
        raise UserError(f"there is no selection record at {url}; without one the test split stays closed") from None


def open_test(task: Task, url: str, *, trial: str) -> TestSplit:
    """The test split of `task` for the trial (its digest) of the cell whose selection record lies at `url`; recorded.

    Raises:
        UserError: the record does not exist, or was written for another task or other data.
    """
    _record(task, url, trial, task.data_digest, "test")
    return TestSplit(task._test_split, url)


def open_other(task: Task, other: OtherTestSet, url: str, *, trial: str) -> tuple[Task, TestSplit]:
    """Another test set, as a task whose test split is open, by the rule of `open_test`; recorded as an opening of its own."""
    _record(task, url, trial, other.digest, other.what)
    there = replace(task, url=other.url, data_digest=other.digest, _test_split=other.split)
    return there, TestSplit(other.split, url)


def _record(task: Task, url: str, trial: str, data_digest: str, what: str) -> None:
    selection = read_selection(url)
    if (selection.task, selection.data_digest) != (task.name, task.data_digest):
        raise UserError(
            f"{url} was written for {selection.task} with data {selection.data_digest[:12]}, "
            f"not for {task.name} with data {task.data_digest[:12]}; use another sweep folder"
        )
    now_s = time.time()
    opening = Opening(
        task=task.name,
        data_digest=data_digest,
        trial=trial,
        protocol_digest=selection.protocol_digest,
        selection_url=url,
        selection_sha256=record_sha256(url),
        time_s=now_s,
        what=what,
    )
    folder = objects.join(url.rsplit("/", 2)[0], "openings")
    place = objects.join(folder, f"{trial}-{time.time_ns()}.json")
    objects.write_bytes(place, (json.dumps(asdict(opening), indent=1) + "\n").encode())


def record_sha256(url: str) -> str:
    """Of a selection record's bytes: the seal of each opening."""
    return hashlib.sha256(objects.read_bytes(url, max_bytes=documents.MAX_BYTES)).hexdigest()


def openings(sweep: str) -> list[Opening]:
    """Every recorded opening of a sweep, in the order of time."""
    found = [
        documents.read(u, Opening, remedy="restore it, or run the sweep again in another folder")
        for u in objects.list_urls(objects.join(sweep, "openings"), ".json")
    ]
    return sorted(found, key=lambda o: o.time_s)
