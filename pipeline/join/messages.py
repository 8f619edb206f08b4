"""What ranks tell each other before a run starts (`pipeline.join.agreement`): small documents of bounded size."""

import dataclasses
from typing import TypeVar

from pipeline import documents
from pipeline.documents import Text
from pipeline.storage.process_identity import Process

MAX_BYTES = 1 << 16
REMEDY = "start all ranks with one version of normfree"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    host: Text
    machine: Text
    facts: dict[Text, Text]
    error: Text = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    host: Text
    process: Process | None = None
    """For ranks on the main rank's machine, which own the folder with it."""
    differences: dict[Text, Text] = dataclasses.field(default_factory=dict)
    """This rank's values of the facts that differ."""
    loopback: Text = ""
    """The loopback address that this host's name stands for, where it has one and gloo would use it."""
    error: Text = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owned:
    token: Text = ""
    clock_s: float = 0.0
    is_elsewhere: bool = False
    """Some ranks are on other machines than the main rank."""
    refused: Text = ""
    table: list[Text] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    host: Text
    out: Text
    reason: Text
    """Why the mark is not there; empty where it is."""
    ahead_s: float
    """Of this host's clock before the main rank's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    refused: Text = ""
    table: list[Text] = dataclasses.field(default_factory=list)
    notes: dict[Text, Text] = dataclasses.field(default_factory=dict)


def read(data: bytes, kind: type[T], who: str) -> T:
    """UserError for what is no such document."""
    return documents.parse(data, kind, f"what {who} says of its host", max_bytes=MAX_BYTES, remedy=REMEDY)
