"""What has been run, by content address: the truth about a sweep, whatever its scheduler remembers.

    <sweep>/sweep.json            what the sweep is: suite, checkpoint, model, what is not run and why
    <sweep>/trials/<digest>.json  one finished trial; the digest is over everything that decides its result
    <sweep>/selection/...         `transfer.splits`

An entry is written once, whole, when its trial is over. A trial with an "ok" entry is never run again; a failed one
is run again when the sweep is started again, and its entry replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from pipeline import storage
from pipeline.errors import UserError
from transfer.tasks import METRIC, Init, Method, sha256

Kind = Literal["final", "search"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Everything that decides the result of a trial, and nothing else."""

    kind: Kind
    """search: scored on the held-out part; final: scored on the test split."""
    task: str
    method: Method
    init: Init
    shots: int
    seed: int
    """Draws the support, the order, the augmentation, the new head, and a from-scratch network's weights."""
    hyperparameters: dict[str, Any]
    protocol_digest: str
    checkpoint_digest: str
    """Of the commit file; empty from scratch."""
    data_digest: str
    metric: str = METRIC

    @property
    def digest(self) -> str:
        return sha256(asdict(self))

    @property
    def cell(self) -> tuple[str, Method, Init, int]:
        return self.task, self.method, self.init, self.shots


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A finished trial, as `trials/<digest>.json` holds it."""

    digest: str
    kind: Kind
    task: str
    task_title: str
    method: Method
    init: Init
    shots: int
    seed: int
    metric: str
    value: float | None
    """0..1; None if the trial failed."""
    num_train: int
    num_test: int
    """Images that `value` was measured on: of the held-out part for a search trial."""
    hyperparameters: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    """Rows of step, time_s (Unix), loss, accuracy: on the held-out part for a search trial, of training for a final
    one."""
    seconds_s: float
    images_seen: int
    """Training images consumed, repetitions included."""
    protocol_digest: str
    checkpoint_url: str
    checkpoint_digest: str
    data_digest: str
    status: Literal["ok", "failed"]
    error: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.status == "ok" and self.value is not None


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
) -> Entry:
    """The entry of a trial that is over; failed if there is an error or the value is not finite."""
    if error is None and (value is None or not math.isfinite(value)):
        error = f"the {trial.metric} is {value}"
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


class Ledger:
    """The trials of one sweep folder."""

    def __init__(self, sweep: str) -> None:
        self.sweep = sweep

    def _url(self, digest: str) -> str:
        return storage.join(self.sweep, "trials", f"{digest}.json")

    def write(self, entry: Entry) -> None:
        """Whole or not at all."""
        storage.write_bytes(
            self._url(entry.digest), (json.dumps(asdict(entry), indent=1, allow_nan=False) + "\n").encode()
        )

    def remove(self, digest: str) -> None:
        storage.remove(self._url(digest))

    def find(self, digest: str) -> Entry | None:
        try:
            return _entry(storage.read_bytes(self._url(digest)), self._url(digest))
        except FileNotFoundError:
            return None

    def is_done(self, trial: Trial) -> bool:
        """Whether the trial ended well, and so is not run again."""
        found = self.find(trial.digest)
        return found is not None and found.status == "ok"

    def entries(self) -> Iterator[Entry]:
        """All entries, sorted by digest."""
        urls = storage.list_urls(storage.join(self.sweep, "trials"), ".json")
        with ThreadPoolExecutor(8) as pool:  # an object store takes its time for each of hundreds of small objects
            for url, data in zip(urls, pool.map(storage.read_bytes, urls), strict=True):
                yield _entry(data, url)

    def info(self) -> SweepInfo:
        """UserError if the folder holds no sweep."""
        url = storage.join(self.sweep, "sweep.json")
        try:
            return SweepInfo(**json.loads(storage.read_bytes(url)))
        except FileNotFoundError:
            raise UserError(
                f"there is no sweep at {self.sweep} (no sweep.json); run 'normfree transfer' first"
            ) from None
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{url} does not describe a sweep ({error}); use another folder") from None

    def claim(self, info: SweepInfo) -> SweepInfo:
        """Make the folder this sweep's, or check that it is; started_s of the first start is kept.

        Raises:
            UserError: the folder belongs to a sweep of another checkpoint or suite.
        """
        url = storage.join(self.sweep, "sweep.json")
        if storage.exists(url):
            there = self.info()
            for name in ("suite", "checkpoint"):
                if getattr(there, f"{name}_digest") != getattr(info, f"{name}_digest"):
                    theirs = there.suite if name == "suite" else there.checkpoint_url
                    raise UserError(
                        f"{self.sweep} holds a sweep of another {name} ({theirs}, digest "
                        f"{getattr(there, f'{name}_digest')[:12]}); give another folder with --out"
                    )
            info = SweepInfo(**{**asdict(info), "started_s": there.started_s})
        storage.write_bytes(url, (json.dumps(asdict(info), indent=1) + "\n").encode())
        return info


def _entry(data: bytes, url: str) -> Entry:
    try:
        content = json.loads(data)
        return Entry(**{f.name: content.pop(f.name) for f in fields(Entry)})
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(
            f"{url} is not an entry of a sweep's ledger ({error!r}); delete this file, its trial runs again"
        ) from None
