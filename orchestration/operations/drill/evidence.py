"""What a run left: checkpoints, weights, its account of samples, its records. Read only; each check raises `Lost`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.spool import spool
from pipeline import documents
from pipeline.checkpoint import commit, load
from pipeline.data.loading import sample_ledger
from pipeline.documents import Count, Text
from pipeline.errors import UserError

TOLERANCE = 1e-6
"""Of weights, momentum and averages against those of the undisturbed run."""


class Lost(Exception):
    """The end of a scenario that a run did not survive: what was expected, and what it did, in a sentence."""


def newest_step(out: Path) -> int:
    """Step of the newest committed checkpoint; -1 if there is none."""
    urls = commit.committed(str(out))
    return commit.read_commit(urls[0]).step if urls else -1


def final_state(out: Path, *, num_steps: int) -> load.State:
    """The state in the newest checkpoint of a run, which must be whole and of its last step."""
    cache = str(out.parent / "cache")  # local checkpoints are read where they lie
    found, passed = load.newest(str(out), cache)
    if passed or found is None:
        raise Lost(f"the checkpoint does not verify: {passed[0].reason if passed else 'there is none'}")
    if found.step != num_steps:
        raise Lost(f"the newest checkpoint is of step {found.step}, not of the last one, {num_steps}")
    try:
        return load.load_state(found, cache)
    except UserError as error:
        raise Lost(str(error)) from None


def compare(state: load.State, undisturbed: load.State) -> str:
    """How near they are, in words. Lost beyond `TOLERANCE`."""
    if {k: v.keys() for k, v in state.items()} != {k: v.keys() for k, v in undisturbed.items()}:
        raise Lost("the last checkpoint holds other tensors than the undisturbed run's")
    worst, where = 0.0, ""
    for kind, tensors in undisturbed.items():
        for name, theirs in tensors.items():
            difference = float((state[kind][name] - theirs).abs().max()) if theirs.numel() else 0.0
            if difference > worst:
                worst, where = difference, f"{kind} of {name}"
    if worst > TOLERANCE:
        raise Lost(f"the last checkpoint is not the undisturbed run's: {where} differ by {worst:.2g}")
    kinds = ", ".join(undisturbed)
    return (
        f"{kinds} bit-equal to the undisturbed run"
        if not worst
        else f"{kinds} within {worst:.1g} of the undisturbed run"
    )


@dataclass(frozen=True)
class _Page:
    """A line of `ledger.json`: passes with equal numbers."""

    source: Text
    epochs: tuple[Count, Count]
    manifest: Count
    used: Count
    skipped: Count
    dropped: Count
    excluded: Count
    repeated: Count
    entries: list[dict[str, Any]]


@dataclass(frozen=True)
class Account:
    """The content of `ledger.json`."""

    step: Count
    pages: list[_Page]

    @property
    def lost_keys(self) -> list[str]:
        return [str(entry["key"]) for page in self.pages for entry in page.entries]


def account(out: str | Path, *, positions: int) -> Account:
    """A run's account of its samples. Lost unless it adds up in each pass, and over the run to the images that it drew.

    Args:
        positions: steps times the global batch.
    """
    url = f"{out}/{sample_ledger.NAME}"
    try:
        found = documents.read(url, Account, max_bytes=sample_ledger.MAX_BYTES)
    except (OSError, UserError) as error:
        raise Lost(f"there is no account of the samples: {error}") from None
    drawn = 0
    for page in found.pages:
        parts = page.used + page.skipped + page.dropped + page.excluded
        if parts != page.manifest:
            raise Lost(
                f"the ledger does not add up: of {page.manifest} samples in the manifest {page.used} were used, {page.skipped} "
                f"skipped, {page.dropped} dropped, {page.excluded} excluded"
            )
        drawn += (1 + page.epochs[1] - page.epochs[0]) * (page.used + page.repeated)
    if drawn != positions:
        raise Lost(f"the ledger does not add up: the run drew {positions} images, and {drawn} are accounted for")
    return found


class Records:
    """The records of a run's attempts, in order."""

    def __init__(self, folder: Path) -> None:
        self._lines = [line.value for line in spool.read(folder / spool.MAIN)]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self._lines if line["kind"] == kind]

    def resumed_at(self) -> list[int]:
        """Of each start of the training after the first one: the step at which it went on."""
        return [int(line["step"]) for line in self.of("Started")][1:]
