"""Every byte and every image of a dataset, held against its manifest."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.data.format.index import SplitIndex
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.tars import BadTar
from pipeline.data.images.decode import DecodeError, decode_image
from pipeline.data.parts import Part
from pipeline.data.process_pool import Each, each
from pipeline.data.verify.tar_scan import TarSample, TarScan, scan_tar
from pipeline.data.verify.wds_labels import is_label, label_text
from pipeline.errors import UserError
from pipeline.storage import objects

MAX_HASH_DISTANCE = 4
"""Bits by which the stored perceptual hash may differ: decoders do not agree in the last bit of a pixel."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    num_shards: int
    num_samples: int
    num_bytes: int
    """Read and hashed."""
    problems: tuple[str, ...]
    """One sentence for each index, shard or sample that is not as the manifest says; empty if all is well."""


@dataclass(frozen=True)
class _ShardCheck:
    """What a worker process needs to check any shard."""

    url: str
    classes: tuple[str, ...]
    indices: dict[str, SplitIndex]
    label_field: str | None
    label_kind: str

    def __call__(self, place: tuple[str, int]) -> tuple[int, int, list[str]]:
        """(bytes read, samples, problems) of the shard at (split, number); one problem where its index does not verify."""
        split, number = place
        index = self.indices[split]
        try:
            shard, rows, samples = index.shards[number], index.shard_rows(number), index.samples_of(number)
            keys = index.keys[samples.start : samples.stop].tolist()
            hashes = index.keys.hashes_of(np.array(samples))
        except UserError as error:
            return 0, 0, [f"{split}: {error}"]
        url = objects.join(self.url, shard.name)
        if not objects.exists(url):
            return 0, len(rows), [f"{shard.name}: missing"]
        found, problems = TarScan(), []
        try:
            scan_tar(url, found)
        except BadTar as error:
            problems.append(str(error))
        if found.num_bytes != shard.size_bytes:
            problems.insert(0, f"{found.num_bytes} bytes where {shard.size_bytes} should be")
        elif found.sha256 != shard.sha256:
            problems.insert(0, "its bytes have changed (SHA-256 differs)")
        if len(set(keys)) != len(keys):
            problems.append("a key occurs twice in its index")
        for row, phash, key in zip(rows, hashes.tolist(), keys, strict=True):
            problem = self._sample_problem(row, phash, found.samples.get(key), url)
            if problem:
                problems.append(f"sample {key} {problem}")
        return found.num_bytes, len(rows), [f"{shard.name}: {problem}" for problem in problems]

    def _sample_problem(self, row: np.void, phash: int, sample: TarSample | None, url: str) -> str | None:
        place = (int(row["offset"]), int(row["size"]))
        if sample is None or sample.images != [place]:
            if sample is not None and sample.images:
                return "lies elsewhere than its index says"
            return _unreachable(url, *place)
        if sample.problem:
            return f"cannot be used ({sample.problem})"
        if sample.crc32 != int(row["crc32"]):
            is_near = (sample.phash ^ phash).bit_count() <= MAX_HASH_DISTANCE
            return f"{'has other bytes' if is_near else 'shows another picture'} than when it was written"
        try:
            text = label_text(sample.labels, self.label_field)
        except ValueError as error:
            return f"has lost its label ({error})"
        is_same = is_label(text, int(row["label"]), self.classes, self.label_kind)
        return None if is_same else "has another label than its index"


def _unreachable(url: str, offset: int, size: int) -> str:
    """What there is to say of a sample that a walk through the tar does not meet."""
    try:
        decode_image(objects.read_range(url, offset, size))
    except OSError:
        return "lies behind the end of its shard"
    except DecodeError as error:
        return f"is not in the tar any more, and its place does not decode ({error})"
    return "is not in the tar any more, though its image is still at its place"


def verify(
    url: str,
    *,
    workers: int = 1,
    run_each: Each | None = None,
    part: Part | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read every byte of every shard, decode every image, and hold all of it against the manifest and its indices.

    Args:
        run_each: runs the work in place of `workers` processes of this machine.
        part: a share of the shards only; `merged` puts such together.
        progress: called as progress(done, total) in shards.
    Raises:
        UserError: no dataset there, or its manifest is damaged; what else is wrong is in the answer, all of it.
    """
    manifest = Manifest.open(url)
    run_each = run_each or partial(each, num_workers=workers)
    indices = {name: manifest.split(name) for name in manifest.splits}
    adopted = manifest.recipe.get("adopted") or {}
    check = _ShardCheck(
        manifest.url, manifest.classes, indices, adopted.get("label_field"), adopted.get("labels") or "numbers"
    )
    places = [(name, number) for name, index in indices.items() for number in range(len(index.shards))]
    pieces = [(name, number) for name, index in indices.items() for number in range(len(index.pieces))]
    if part is not None:
        places, pieces = list(part.share(places)), list(part.share(pieces))
    num_bytes, num_samples, problems = 0, 0, set[str]()  # what is wrong with a piece, each of its shards says
    for done, (size, num, found) in enumerate(run_each(check, places), start=1):
        num_bytes, num_samples = num_bytes + size, num_samples + num
        problems.update(found)
        if progress is not None:
            progress(done, len(places))
    for found in run_each(partial(_files_problems, indices), pieces):
        problems.update(found)
    try:
        len(manifest.skipped)
    except UserError as error:
        problems.add(str(error))
    return Verification(len(places), num_samples, num_bytes, tuple(sorted(problems)))


def merged(found: Sequence[Verification]) -> Verification:
    """What parts have found, as of the whole dataset."""
    problems = {problem for part in found for problem in part.problems}
    return Verification(
        sum(part.num_shards for part in found),
        sum(part.num_samples for part in found),
        sum(part.num_bytes for part in found),
        tuple(sorted(problems)),
    )


def _files_problems(indices: dict[str, SplitIndex], place: tuple[str, int]) -> list[str]:
    """The bytes of a piece's objects themselves."""
    split, number = place
    index = indices[split]
    try:
        table = index.table(number)
    except UserError as error:
        return [f"{split}: {error}"]
    problems = []
    for file in (table.rows, table.keys):
        where = objects.join(index.url, file.name)
        try:
            data = objects.read_bytes(where, max_bytes=file.size_bytes + 1)
            if hashlib.sha256(data).hexdigest() != file.sha256:
                problems.append(f"{split}: {file.name} has changed (SHA-256 differs)")
        except FileNotFoundError:
            problems.append(f"{split}: {file.name} is missing")
    return problems
