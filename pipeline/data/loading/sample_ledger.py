"""The ledger: what became of every sample of every epoch, and the plan that says so before the first step.

    manifest = used + skipped + dropped + excluded          (different samples)
    positions = used + repeated + those of skipped updates   (images that the network saw)

It is computed from the order, which is what the loader reads by, plus what was lost on the way. The number of images that
the ranks counted as seen is held against it at every step.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import documents
from pipeline.data.images import turbojpeg
from pipeline.data.loading.batches import UnreadableSample
from pipeline.data.loading.datasets import TrainData
from pipeline.data.loading.make_order import describe
from pipeline.documents import Count
from pipeline.storage import objects

NAME = "ledger.json"
MAX_BYTES = 256 << 20
_REMEDY = "restore it, or delete it: the account then lacks what was lost before"


@dataclass(frozen=True)
class UnusedSample:
    """A sample that one step should have used and did not."""

    step: int
    shard: str
    key: str
    reason: str
    filled_with: str = ""


Entries = dict[tuple[int, int], list[UnusedSample]]
"""By source and epoch."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One pass over one source. Numbers of different samples, but for `repeated`."""

    source: str
    epoch: int
    manifest: int
    used: int
    skipped: int
    """Unreadable, in an update that was skipped, or in a range that data.skip_steps names; see `entries`."""
    dropped: int
    """Not reached: the run ends before, or has not come there yet."""
    excluded: int
    """Not in the subset that the run trains on."""
    repeated: int
    """Images beyond the first of a sample: copies of repeated augmentation, and fillers of lost places."""
    entries: tuple[UnusedSample, ...]


class Ledger:
    """The account of a run, equal on all ranks."""

    def __init__(self, data: TrainData, *, global_batch: int) -> None:
        self._data, self._global_batch = data, global_batch
        self._distinct = data.distinct(global_batch)
        self._entries: Entries = defaultdict(list)
        self._closed: dict[int, int] = {}

    # --- what happens -------------------------------------------------------------------------------------------------

    def lost(self, step: int, losses: Iterable[UnreadableSample]) -> None:
        for loss in losses:
            entry = UnusedSample(step, loss.shard, loss.key, loss.reason, loss.filled_with)
            self._entries[loss.source, loss.epoch].append(entry)

    def skipped(self, step: int, reason: str) -> None:
        """No sample of this step's update was used."""
        for source, epoch, shard, key in self._data.keys(step, self._global_batch):
            self._entries[source, epoch].append(UnusedSample(step, shard, key, reason))

    def lost_since_epoch_began(self, step: int) -> int:
        """Samples lost in the epoch in which a step begins: what the loss budget speaks of."""
        first = self._epoch(step) * self._data.num_samples
        return sum(
            1
            for entries in self._entries.values()
            for e in entries
            if e.filled_with and self._data.config.data_step(e.step) * self._distinct >= first
        )

    def _epoch(self, step: int) -> int:
        return self._data.config.data_step(step) * self._distinct // self._data.num_samples

    def _reach(self, step: int) -> int:
        """Steps of the data that the first `step` steps used or skipped by name."""
        return self._data.config.data_step(step - 1) + 1 if step else 0

    def epochs(self, step: int) -> float:
        """Passes over the data after `step` steps, what was skipped by name included."""
        return self._reach(step) * self._distinct / self._data.num_samples

    # --- what it comes to ---------------------------------------------------------------------------------------------

    def covered(self, source: int, step: int) -> int:
        """Samples of a source that the first `step` steps drew or skipped by name."""
        return self._data.mixture.consumed(source, self._reach(step) * self._distinct)

    def page(self, source: int, epoch: int, step: int) -> Page:
        """The account of a pass after `step` steps."""
        data = self._data
        pool, manifest = len(data.pools[source]), data.indices[source].num_samples
        covered = min(max(self.covered(source, step) - epoch * pool, 0), pool)
        # A step that ended the run lost images too, and none of its samples is among the covered ones.
        entries = [e for e in self._entries.get((source, epoch), []) if e.step < step]
        by_name = self._skipped_by_name(source, epoch, step)
        lost = {(e.shard, e.key) for e in entries}
        skipped = len(lost) + by_name
        used = covered - skipped
        if used < 0 or skipped > covered:
            raise RuntimeError(f"the ledger of epoch {epoch} does not add up: {skipped} skipped of {covered}")
        return Page(
            source=data.names[source],
            epoch=epoch,
            manifest=manifest,
            used=used,
            skipped=skipped,
            dropped=pool - covered,
            excluded=manifest - pool,
            repeated=used * (data.config.repeats - 1) + sum(1 for e in entries if e.filled_with),
            entries=tuple(entries),
        )

    def _skipped_by_name(self, source: int, epoch: int, step: int) -> int:
        """Samples of a pass in the ranges of data.skip_steps that lie before `step`."""
        pool, total = len(self._data.pools[source]), 0
        reach = self._reach(step)
        for first, end in self._data.config.skipped_ranges():
            bounds = [
                min(max(self._data.mixture.consumed(source, s * self._distinct) - epoch * pool, 0), pool)
                for s in (min(first, reach), min(end, reach))
            ]
            total += bounds[1] - bounds[0]
        return total

    def pages(self, step: int) -> list[Page]:
        """All passes that the first `step` steps have begun, source by source."""
        return [
            self.page(source, epoch, step)
            for source, pool in enumerate(self._data.pools)
            for epoch in range(-(-self.covered(source, step) // len(pool)))
        ]

    def closed(self, step: int) -> list[Page]:
        """The passes with losses that ended since the last call: those that a reader must hear of."""
        found = []
        for source, pool in enumerate(self._data.pools):
            whole = self.covered(source, step) // len(pool)
            for epoch in range(self._closed.get(source, 0), whole):
                if self._entries.get((source, epoch)):
                    found.append(self.page(source, epoch, step))
            self._closed[source] = whole
        return found

    # --- on disk ------------------------------------------------------------------------------------------------------

    def to_json(self, step: int) -> bytes:
        """The content of `ledger.json`; passes with equal numbers and nothing lost share a line."""
        content = {"format": "normfree-ledger", "step": step, "pages": _merged(self.pages(step))}
        return (json.dumps(content, indent=1) + "\n").encode()

    def read(self, folder: str, step: int) -> Entries | None:
        """What a run that goes on at `step` lost before; later entries will happen again, or will not. None: nothing says."""
        try:
            content = documents.read(objects.join(folder, NAME), _Written, max_bytes=MAX_BYTES, remedy=_REMEDY)
        except FileNotFoundError:
            return None
        number = {name: i for i, name in enumerate(self._data.names)}
        found: Entries = defaultdict(list)
        for page in content.pages:
            for entry in page.entries:
                if entry.step < step and page.source in number:
                    found[number[page.source], page.epochs[0]].append(entry)
        return dict(found)

    def restore(self, entries: Entries, step: int) -> None:
        """Go on from `step` with what was lost before it."""
        self._entries = defaultdict(list, entries)
        self._closed = {source: self.covered(source, step) // len(pool) for source, pool in enumerate(self._data.pools)}

    def rewind(self, step: int) -> None:
        kept = {page: [e for e in entries if e.step < step] for page, entries in self._entries.items()}
        self.restore({page: entries for page, entries in kept.items() if entries}, step)


@dataclass(frozen=True)
class _WrittenPage:
    source: str
    epochs: tuple[Count, Count]
    entries: list[UnusedSample]


@dataclass(frozen=True)
class _Written:
    """What `to_json` writes, as far as it is read again."""

    pages: list[_WrittenPage]


def _merged(pages: Sequence[Page]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for page in pages:
        facts = asdict(page)
        epoch, facts["entries"] = facts.pop("epoch"), list(facts["entries"])
        if found and not page.entries and {**facts, "epochs": found[-1]["epochs"]} == found[-1]:
            found[-1]["epochs"][1] = epoch
        else:
            found.append({"epochs": [epoch, epoch], **facts})
    return found


def plan(data: TrainData, *, global_batch: int, total_steps: int) -> tuple[str, ...]:
    """What will become of the samples, in sentences, before the first step."""
    config, ledger = data.config, Ledger(data, global_batch=global_batch)
    lines = []
    for source, (name, pool) in enumerate(zip(data.names, data.pools, strict=True)):
        covered = ledger.covered(source, total_steps)
        last = ledger.page(source, max(-(-covered // len(pool)) - 1, 0), total_steps)
        text = f"{name}: {len(pool):,} of {last.manifest:,} images, {covered / len(pool):.2f} passes"
        if len(data.names) > 1:
            share = data.mixture.consumed(source, 10_000) / 10_000
            text += f", {share:.1%} of each batch"
        text += f"; {last.excluded:,} are not in the subset" if last.excluded else ""
        text += f"; {last.dropped:,} of the last pass are dropped, because the run ends before" if last.dropped else ""
        order = describe(config, data.indices[source], data.layouts[source])
        lines.append(f"{text}; {order}" if order else text)
    if config.repeats > 1:
        lines.append(
            f"each image comes {config.repeats} times in its batch: {data.distinct(global_batch)} different ones of "
            f"{global_batch}, {data.num_samples * (config.repeats - 1):,} repeated an epoch"
        )
    for first, end in config.skipped_ranges():
        lines.append(
            f"the data of steps {first} to {end - 1} are skipped, {(end - first) * global_batch:,} images, as asked"
        )
    lines.append(f"unreadable images allowed an epoch: {data.lost_allowed:,}; each is replaced by another of its batch")
    lines += [f"shard {fault.reason}; {fault.num_samples} images are lost with that" for fault in data.faults]
    if turbojpeg.library() is None:
        lines.append("there is no TurboJPEG 3 library: JPEGs are decoded whole, slower; pip install turbojpeg")
    return tuple(lines)
