"""What has been run, by content address: the truth about a sweep, whatever its scheduler remembers.

    <sweep>/sweep.json                 what the sweep is: suite, backbones, what is not run and why
    <sweep>/trials/<digest>.json       one finished trial; the digest is over everything that decides its result
    <sweep>/predictions/<digest>.npz   what a final trial predicts for each test image (`transfer.measurement.predictions`)
    <sweep>/running.json               what ran when that was told last, for `normfree status`
    <sweep>/rungs/, decisions/         `transfer.search.successive_halving`, `transfer.search.optuna_search`
    <sweep>/selection/, openings/      `transfer.protocol.sealed_splits`

An entry is written once, whole, when its trial is over. A trial with a result is never run again, and a divergence is one
(`transfer.sweep.failures`); a failed one without is run again when the sweep is started again, and its entry replaced.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from pipeline import documents
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.sweep.entry import LedgerEntry, Trial, parse_entry, seal

RUNNING = "running.json"


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
    recipes: list[str] = field(default_factory=list)
    """Of methods that give each backbone the recipe of its family: which one, a sentence for each (`recipes_told`)."""
    data: dict[str, str] = field(default_factory=dict)
    """Digest of each task's dataset."""
    scheduler: str = "asha"
    """How candidates of a search are stopped (`transfer.search.grids`), and drawn."""
    search: str = "grid"
    code_revision: str = ""
    folder: str = ""
    """In which the command was typed."""
    num_trials: int = 0
    """That it takes in all; 0 of an earlier version."""
    first_suite_digest: str = ""
    """Of the suite that the sweep began with, where it has been started more than once."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Of `transfer.sweep.cells.sweep_of`: what it takes to run a trial of this sweep again."""


class Ledger:
    """The trials of one sweep folder."""

    def __init__(self, sweep: str) -> None:
        self.sweep = sweep

    def _url(self, digest: str) -> str:
        return objects.join(self.sweep, "trials", f"{digest}.json")

    def write(self, entry: LedgerEntry) -> None:
        """Whole or not at all."""
        content = asdict(entry)
        content["seal"] = seal(content)
        objects.write_bytes(self._url(entry.digest), (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def tell_running(self, jobs: list[dict[str, Any]]) -> None:
        """What runs now: rows of name, since_s (Unix). What cannot be written is told the next time."""
        content = json.dumps({"time_s": time.time(), "jobs": jobs}, indent=1)
        with contextlib.suppress(Exception):  # clients of stores raise what they like
            objects.write_bytes(objects.join(self.sweep, RUNNING), content.encode())

    def running(self) -> list[str]:
        """Names of what ran when that was told last; [] where it is not known."""
        try:
            found = documents.read(objects.join(self.sweep, RUNNING), dict[str, Any])
            return [str(job["name"]) for job in found["jobs"]]
        except (FileNotFoundError, UserError, KeyError, TypeError):
            return []

    def remove(self, digest: str) -> None:
        objects.remove(self._url(digest))

    def find(self, digest: str) -> LedgerEntry | None:
        url = self._url(digest)
        try:
            return parse_entry(objects.read_bytes(url, max_bytes=documents.MAX_BYTES + 1), url)
        except FileNotFoundError:
            return None

    def is_done(self, trial: Trial) -> bool:
        """It has a result, a divergence included, and so is not run again."""
        found = self.find(trial.digest)
        return found is not None and not found.lacks_result

    def entries(self) -> Iterator[LedgerEntry]:
        """All entries, sorted by digest."""
        urls = objects.list_urls(objects.join(self.sweep, "trials"), ".json")
        with ThreadPoolExecutor(8) as pool:  # an object store takes its time for each of hundreds of small objects
            read = partial(objects.read_bytes, max_bytes=documents.MAX_BYTES + 1)
            for url, data in zip(urls, pool.map(read, urls), strict=True):
                yield parse_entry(data, url)

    def info(self) -> SweepInfo:
        """UserError if the folder holds no sweep."""
        url = objects.join(self.sweep, "sweep.json")
        try:
            return documents.read(url, SweepInfo, remedy="start the sweep again with the same command and --out")
        except FileNotFoundError:
            raise UserError(
                f"there is no sweep at {self.sweep} (no sweep.json); run 'normfree transfer' first"
            ) from None

    def claim(self, info: SweepInfo, *, grown_from: str = "") -> SweepInfo:
        """Make the folder this sweep's, or check that it is; started_s of the first start is kept.

        Args:
            grown_from: digest of the suite that this one has grown from (`transfer.protocol.suite_files.grown`).
        Raises:
            UserError: the folder belongs to a sweep of another suite, of a checkpoint that is not asked for now, of other data
            under a task's name, or with another way to search.
        """
        url = objects.join(self.sweep, "sweep.json")
        if objects.exists(url):
            there = self.info()
            ours = {info.checkpoint_digest, *(s["digest"] for s in info.sources)}
            for name, theirs, digest, same in (
                ("suite", there.suite, there.suite_digest, there.suite_digest in (info.suite_digest, grown_from)),
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
            first = there.first_suite_digest or there.suite_digest
            info = replace(info, started_s=there.started_s, data={**there.data, **info.data}, first_suite_digest=first)
        objects.write_bytes(url, (json.dumps(asdict(info), indent=1) + "\n").encode())
        return info
