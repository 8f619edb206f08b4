"""What has been run, by content address: the truth about a sweep, whatever its scheduler remembers.

    <sweep>/sweep.json                 what the sweep is: suite, backbones, what is not run and why
    <sweep>/trials/<digest>.json       one finished trial; the digest is over everything that decides its result
    <sweep>/predictions/<digest>.npz   what a final trial predicts for each test image (`transfer.measurement.predictions`)
    <sweep>/rungs/, decisions/         `transfer.search.successive_halving`, `transfer.search.optuna_search`
    <sweep>/selection/, openings/      `transfer.protocol.sealed_splits`

An entry is written once, whole, when its trial is over. A trial with an "ok" entry is never run again; a failed one is run again
when the sweep is started again, and its entry replaced.
"""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from msgspec import Meta

from pipeline import documents
from pipeline.documents import Count, Positive, Sha256, Share, Text
from pipeline.errors import UserError
from pipeline.storage import objects
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
class Entry:
    """A finished trial, as `trials/<digest>.json` holds it, with a seal (`_seal`)."""

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
    task_title: str,
    checkpoint_url: str,
    value: float | None,
    num_train: int = 0,
    num_test: int = 0,
    history: list[dict[str, float]] | None = None,
    seconds_s: float = 0.0,
    images_seen: int = 0,
    error: str | None = None,
    cause: Cause = "",
    **facts: Any,
) -> Entry:
    """The entry of a trial that is over; failed if there is an error or the value is not finite.

    Args:
        facts: other fields of `Entry`.
    """
    if error is None and (value is None or not math.isfinite(value)):
        error, cause = f"the {trial.metric} is {value}", "diverged"
    return Entry(
        digest=trial.digest,
        **asdict(trial),
        task_title=task_title,
        value=None if error else value,
        num_train=num_train,
        num_test=num_test,
        history=[row for row in history or [] if all(math.isfinite(v) for v in row.values())],
        seconds_s=seconds_s,
        images_seen=images_seen,
        checkpoint_url=checkpoint_url if trial.checkpoint_digest else "",
        status="failed" if error else "ok",
        error=error,
        cause=cause,
        **facts,
    )


@dataclass(frozen=True, kw_only=True)
class SweepInfo:
    """The content of sweep.json."""

    suite: str
    suite_digest: str
    checkpoint_url: str
    checkpoint_digest: str
    model: str
    started_s: float
    command: str
    hardware: str
    num_seeds: int
    not_run: list[dict[str, Any]]
    """Rows of task, method, shots, reason: what the suite asks for and the data cannot give."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """The backbones: name, url, digest, model, options, classes. The first one's are above."""
    data: dict[str, str] = field(default_factory=dict)
    """Digest of each task's dataset."""
    scheduler: str = "asha"
    """How candidates of a search are stopped (`transfer.search.grids`), and drawn."""
    search: str = "grid"
    code_revision: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    """Of `transfer.sweep.cells.sweep_of`: what it takes to run a trial of this sweep again."""


class Ledger:
    """The trials of one sweep folder."""

    def __init__(self, sweep: str) -> None:
        self.sweep = sweep

    def _url(self, digest: str) -> str:
        return objects.join(self.sweep, "trials", f"{digest}.json")

    def write(self, entry: Entry) -> None:
        """Whole or not at all."""
        content = asdict(entry)
        content["seal"] = _seal(content)
        objects.write_bytes(self._url(entry.digest), (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def remove(self, digest: str) -> None:
        objects.remove(self._url(digest))

    def find(self, digest: str) -> Entry | None:
        try:
            return _entry(objects.read_bytes(self._url(digest)), self._url(digest))
        except FileNotFoundError:
            return None

    def is_done(self, trial: Trial) -> bool:
        """It ended well, and so is not run again."""
        found = self.find(trial.digest)
        return found is not None and found.status == "ok"

    def entries(self) -> Iterator[Entry]:
        """All entries, sorted by digest."""
        urls = objects.list_urls(objects.join(self.sweep, "trials"), ".json")
        with ThreadPoolExecutor(8) as pool:  # an object store takes its time for each of hundreds of small objects
            for url, data in zip(urls, pool.map(objects.read_bytes, urls), strict=True):
                yield _entry(data, url)

    def info(self) -> SweepInfo:
        """UserError if the folder holds no sweep."""
        url = objects.join(self.sweep, "sweep.json")
        try:
            return documents.read(url, SweepInfo, remedy="start the sweep again with the same command and --out")
        except FileNotFoundError:
            raise UserError(
                f"there is no sweep at {self.sweep} (no sweep.json); run 'normfree transfer' first"
            ) from None

    def claim(self, info: SweepInfo) -> SweepInfo:
        """Make the folder this sweep's, or check that it is; started_s of the first start is kept.

        Raises:
            UserError: the folder belongs to a sweep of another suite, of a checkpoint that is not asked for now, of other data
            under a task's name, or with another way to search.
        """
        url = objects.join(self.sweep, "sweep.json")
        if objects.exists(url):
            there = self.info()
            ours = {info.checkpoint_digest, *(s["digest"] for s in info.sources)}
            for name, theirs, digest, same in (
                ("suite", there.suite, there.suite_digest, there.suite_digest == info.suite_digest),
                ("checkpoint", there.checkpoint_url, there.checkpoint_digest, there.checkpoint_digest in ours),
                *(("checkpoint", s["url"], s["digest"], s["digest"] in ours) for s in there.sources),
            ):
                if not same:
                    raise UserError(
                        f"{self.sweep} holds a sweep of another {name} ({theirs}, digest {digest[:12]}); give another "
                        "folder with --out"
                    )
            for task, digest in there.data.items():
                if info.data.get(task, digest) != digest:
                    raise UserError(
                        f"{self.sweep} holds a sweep on data for {task} with digest {digest[:12]}, the data there now have "
                        f"{info.data[task][:12]}; restore them, or give another folder with --out"
                    )
            for name in ("scheduler", "search"):
                if getattr(there, name) != getattr(info, name):
                    raise UserError(
                        f"{self.sweep} was searched with --{name} {getattr(there, name)}, now {getattr(info, name)} is asked "
                        "for; give the same, or another folder with --out"
                    )
            info = replace(info, started_s=there.started_s, data={**there.data, **info.data})
        objects.write_bytes(url, (json.dumps(asdict(info), indent=1) + "\n").encode())
        return info


def _entry(data: bytes, url: str) -> Entry:
    """What an entry says, if it says what was written: types, ranges, its address, its seal."""
    content = documents.parse_json(data, url, remedy=AGAIN)
    found = documents.convert(content, Entry, url, remedy=AGAIN)
    if url.rpartition("/")[2] != f"{found.digest}.json":
        raise UserError(f"{url} is the entry of trial {found.digest[:12]} under another name; delete this file")
    if (found.status == "ok") != (found.value is not None):
        raise UserError(f"{url} has status {found.status!r} and value {found.value}; {AGAIN}")
    seal = content.get("seal")
    if seal is None:  # of an earlier version
        return found
    now = _seal({k: v for k, v in content.items() if k != "seal"})
    changed = sorted(k for k in {*now, *seal} if now.get(k) != seal.get(k)) if isinstance(seal, dict) else ["seal"]
    if changed:
        raise UserError(f"{url}: {', '.join(changed)} is not what was written there (its seal says so); {AGAIN}")
    trial = Trial(**{f.name: getattr(found, f.name) for f in fields(Trial)})
    if trial.digest != found.digest:
        raise UserError(f"{url}: its fields make the trial {trial.digest[:12]}, its name says another; {AGAIN}")
    return found


def _seal(content: dict[str, Any]) -> dict[str, str]:
    """Digests over each of the fields, so that a change is named. No signature: who means to deceive can write it anew."""
    return {name: sha256(value)[:SEAL_CHARS] for name, value in content.items()}
