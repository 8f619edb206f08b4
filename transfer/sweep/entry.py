"""A trial, and the entry of one that is over: typed, ranged, sealed."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from msgspec import Meta

from pipeline import documents
from pipeline.documents import Count, Positive, Sha256, Share, Text
from pipeline.errors import UserError
from transfer.measurement.reference_values import Interval
from transfer.protocol.methods import sha256
from transfer.protocol.sealed_splits import GridRow
from transfer.protocol.tasks import METRIC, Init
from transfer.sweep.failures import Cause, is_result

Kind = Literal["final", "search"]
Amount = Annotated[float, Meta(ge=0)]
SEAL_CHARS = 16
AGAIN = "delete this file, its trial runs again"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Everything that decides the result of a trial, and nothing else."""

    kind: Kind
    """search: scored on the held-out part; final: scored on the test split."""
    task: str
    method: str
    """Its name in the suite."""
    init: Init
    shots: int
    """Images of each class; 0 = all, -1000 = VTAB's 1,000 (`transfer.protocol.methods`)."""
    seed: int
    """Draws the support, the order, the augmentation, the new head, and a from-scratch network's weights."""
    hyperparameters: dict[str, Any]
    protocol_digest: str
    checkpoint_digest: str
    """Of the commit file; empty from scratch."""
    data_digest: str
    backbone_digest: str = ""
    """Of the architecture, its options and its preprocessing."""
    metric: str = METRIC

    @property
    def digest(self) -> str:
        return sha256(asdict(self))


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """A finished trial, as `trials/<digest>.json` holds it, with a seal (`seal`)."""

    digest: Sha256
    kind: Kind
    task: Text
    task_title: Text
    method: Text
    init: Init
    shots: int
    seed: Count
    metric: Text
    value: Share | None
    """0..1, by `metric`; None if the trial failed."""
    num_train: Count
    num_test: Count
    """Images that `value` was measured on: of the held-out part for a search trial."""
    hyperparameters: dict[Text, Any]
    history: list[dict[Text, float]] = field(default_factory=list)
    """Rows of step, time_s (Unix), loss, accuracy: on the held-out part for a search trial, of training for a final one."""
    seconds_s: Amount
    images_seen: Count
    """Training images consumed, repetitions included."""
    protocol_digest: Text
    checkpoint_url: Text
    checkpoint_digest: Text
    data_digest: Text
    status: Literal["ok", "failed"]
    error: Text | None = None
    cause: Cause = ""
    """Why it failed (`transfer.sweep.failures`); empty of earlier versions."""
    backbone_digest: Text = ""
    metrics: dict[Text, Share] = field(default_factory=dict)
    """All metrics of a final trial by name."""
    baselines: dict[Text, Share] = field(default_factory=dict)
    """What its metric gives without a look at the images (`transfer.measurement.reference_values`)."""
    test_interval: Interval | None = None
    """Of a final trial where a seed draws nothing: how far other test images would move its value."""
    classes_ordered: bool = False
    """The card says so; of earlier versions not known."""
    backbone: Text = ""
    """For people: the checkpoint, or the architecture of a from-scratch trial."""
    model: Text = ""
    method_kind: Text = ""
    """Of `transfer.protocol.methods.METHOD_KINDS`."""
    method_title: Text = ""
    selection: Text = ""
    """Name of the cell's record under selection/."""
    stopped_at: Count = 0
    """Step at which a search trial was stopped; 0 = it ran to its end."""
    grid: list[GridRow] = field(default_factory=list)
    """Of a probe's search trial: hyperparameters and score of each point."""
    config: dict[Text, Any] = field(default_factory=dict)
    """What it takes to run the trial again: the loop's Run, or a probe's settings."""
    config_digest: Text = ""
    max_memory_bytes: Count = 0
    """Largest use of the device's memory, or without one of the process's own; of several processes that of the largest."""
    watts: dict[Text, Amount] = field(default_factory=dict)
    """Mean power of the device's parts while it ran (`transfer.measurement.resource_usage`); {} where that is not measured."""
    num_processes: Positive = 1
    """That it ran as. Not part of what decides its result."""
    num_tries: Positive = 1
    """In the start that ended it: more than one where its process was lost."""
    code_revision: Text = ""
    measures: dict[Text, float | list[float]] = field(default_factory=dict)
    """What was measured of a final trial's network besides the metrics (`transfer.measurement.network_measures`)."""

    @property
    def is_ok(self) -> bool:
        return self.status == "ok" and self.value is not None

    @property
    def lacks_result(self) -> bool:
        """It failed, and that says nothing about the candidate."""
        return not self.is_ok and not is_result(self.cause, self.error)


def entry(
    trial: Trial,
    *,
    checkpoint_url: str,
    value: float | None,
    history: Sequence[dict[str, float]] = (),
    error: str | None = None,
    cause: Cause = "",
    **facts: Any,
) -> LedgerEntry:
    """The entry of a trial that is over; failed if there is an error or the value is not finite.

    Args:
        facts: other fields of `LedgerEntry`; of one that failed before it began there is nothing to count.
    """
    if error is None and (value is None or not math.isfinite(value)):
        error, cause = f"the {trial.metric} is {value}", "diverged"
    counts: dict[str, Any] = {"num_train": 0, "num_test": 0, "seconds_s": 0.0, "images_seen": 0}
    return LedgerEntry(
        digest=trial.digest,
        **asdict(trial),
        value=None if error else value,
        history=[row for row in history if all(math.isfinite(v) for v in row.values())],
        checkpoint_url=checkpoint_url if trial.checkpoint_digest else "",
        status="failed" if error else "ok",
        error=error,
        cause=cause,
        **(counts | facts),
    )


def parse_entry(data: bytes, url: str) -> LedgerEntry:
    """What an entry says, if it says what was written: types, ranges, its address, its seal."""
    content = documents.parse_json(data, url, remedy=AGAIN)
    found = documents.convert(content, LedgerEntry, url, remedy=AGAIN)
    if url.rpartition("/")[2] != f"{found.digest}.json":
        raise UserError(f"{url} is the entry of trial {found.digest[:12]} under another name; delete this file")
    if (found.status == "ok") != (found.value is not None):
        raise UserError(f"{url} has status {found.status!r} and value {found.value}; {AGAIN}")
    there = content.get("seal")
    if there is None:  # of an earlier version
        return found
    now = seal({k: v for k, v in content.items() if k != "seal"})
    changed = sorted(k for k in {*now, *there} if now.get(k) != there.get(k)) if isinstance(there, dict) else ["seal"]
    if changed:
        raise UserError(f"{url}: {', '.join(changed)} is not what was written there (its seal says so); {AGAIN}")
    trial = Trial(**{f.name: getattr(found, f.name) for f in fields(Trial)})
    if trial.digest != found.digest:
        raise UserError(f"{url}: its fields make the trial {trial.digest[:12]}, its name says another; {AGAIN}")
    return found


def seal(content: dict[str, Any]) -> dict[str, str]:
    """Digests over each of the fields, so that a change is named. No signature: who means to deceive can write it anew."""
    return {name: sha256(value)[:SEAL_CHARS] for name, value in content.items()}
