"""Which sample goes into which shard, decided before any image is read: a pure function of the source's listing.

That is what lets shards be written by any number of processes, in any order, and after any number of interruptions, with
the same bytes. Samples are shuffled over the whole split. A shard is cut by a number of samples, or by bytes: exactly
where the listing tells sizes and images stay as they are, else by the mean size of the first samples.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.format.shards import RECORD_BYTES, sample_bytes, shard_name
from pipeline.data.sampling.order import permutation
from pipeline.data.sources.entry import ImageEntry

_MAX_KEY = 90  # characters; a tar name has room for 100 with the extension
NUM_PROBED = 64
"""Samples that are read to estimate their size where it is not known."""


@dataclass(frozen=True)
class PlannedShard:
    """One shard to write."""

    split: str
    number: int
    entries: tuple[ImageEntry, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)

    def digest(self, how: str) -> str:
        """Changes with everything that decides the bytes of the shard: its samples, and `how` they are written."""
        lines = [how, self.name]
        for entry, key, label in zip(self.entries, self.keys, self.labels, strict=True):
            lines.append(f"{key}\0{label}\0{entry.raw_name}\0{entry.size}{entry.beside_mark}")
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def plan_shards(
    entries: Sequence[ImageEntry],
    classes: Sequence[str],
    *,
    seed: int,
    shard_bytes: int,
    shard_samples: int | None,
    mean_bytes: Callable[[Sequence[ImageEntry]], float] | None,
) -> Iterator[PlannedShard]:
    """The shards of all splits, split by split.

    Args:
        shard_samples: samples of a shard; None: cut by `shard_bytes`.
        mean_bytes: mean size of images, as they are written, from the first of a split; None: the listing's are exact.
    """
    labels = {name: label for label, name in enumerate(classes)}
    ordered = sorted(entries, key=lambda entry: (entry.split, entry.class_name, entry.raw_name))
    keys = unique_keys(ordered)
    for place, split in enumerate(sorted({entry.split for entry in ordered})):
        members = [number for number, entry in enumerate(ordered) if entry.split == split]
        shuffled = [members[position] for position in permutation(len(members), seed, place).tolist()]
        limit = shard_samples
        if limit is None and mean_bytes is not None:
            mean = mean_bytes([ordered[member] for member in shuffled[:NUM_PROBED]])
            limit = max(1, int((shard_bytes - RECORD_BYTES) // sample_bytes(int(mean))))
        cuts = _by_count(shuffled, limit) if limit else _by_bytes(shuffled, ordered, shard_bytes)
        for number, chosen in enumerate(cuts):
            yield PlannedShard(
                split,
                number,
                tuple(ordered[member] for member in chosen),
                tuple(keys[member] for member in chosen),
                tuple(labels[ordered[member].class_name] for member in chosen),
            )


def _by_count(members: Sequence[int], limit: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(members), limit):
        yield members[start : start + limit]


def _by_bytes(members: Sequence[int], ordered: Sequence[ImageEntry], shard_bytes: int) -> Iterator[Sequence[int]]:
    """A shard holds at least one sample, and ends before the one that would make it larger than `shard_bytes`."""
    pending: list[int] = []
    num_bytes = RECORD_BYTES
    for member in members:
        size = sample_bytes(ordered[member].size)
        if pending and num_bytes + size > shard_bytes:
            yield pending
            pending, num_bytes = [], RECORD_BYTES
        pending.append(member)
        num_bytes += size
    if pending:
        yield pending


def unique_keys(ordered: Sequence[ImageEntry]) -> list[str]:
    """A key for each entry that says where it came from, safe as a file name and in a tar; no two alike, case aside."""
    keys: list[str] = []
    taken: set[str] = set()
    for entry in ordered:
        # ImageNet's files carry their class already; twice would only make the index larger.
        stem = entry.key if entry.key.startswith(f"{entry.class_name}_") else f"{entry.class_name}/{entry.key}"
        # WebDataset splits at the first dot; slashes and odd characters would meet file systems of every kind.
        wanted = key = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)
        salt = 0
        while len(key) > _MAX_KEY or key.lower() in taken:
            full = f"{entry.split}/{entry.raw_name}{salt or ''}".encode("utf-8", "surrogateescape")
            key = f"{wanted[: _MAX_KEY - 17]}-{hashlib.sha256(full).hexdigest()[:16]}"
            salt += 1
        taken.add(key.lower())
        keys.append(key)
    return keys
