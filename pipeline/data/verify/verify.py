"""Every byte and every image of a dataset, held against its manifest."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.index import index_problem
from pipeline.data.format.manifest import Manifest, SplitIndex
from pipeline.data.format.tars import BadTar
from pipeline.data.images.decode import DecodeError, decode_image
from pipeline.data.process_pool import each
from pipeline.data.verify.tar_scan import TarScan, scan_tar
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

    def __call__(self, place: tuple[str, int]) -> tuple[int, list[str]]:
        """(bytes read, problems) of the shard at (split, number)."""
        split, number = place
        index = self.indices[split]
        shard = index.shards[number]
        url = objects.join(self.url, shard.name)
        if not objects.exists(url):
            return 0, [f"{shard.name}: missing"]
        found, problems = TarScan(), []
        try:
            scan_tar(url, found)
        except BadTar as error:
            problems.append(str(error))
        if found.num_bytes != shard.size_bytes:
            problems.insert(0, f"{found.num_bytes} bytes where {shard.size_bytes} should be")
        elif found.sha256 != shard.sha256:
            problems.insert(0, "its bytes have changed (SHA-256 differs)")
        rows = np.flatnonzero(index.shard == number)
        keys = [str(key) for key in index.keys[rows]]
        if len(set(keys)) != len(keys):
            problems.append("a key occurs twice in its index")
        for row, key in zip(rows.tolist(), keys, strict=True):
            problem = self._sample_problem(index, row, key, found, url)
            if problem:
                problems.append(f"sample {key} {problem}")
        return found.num_bytes, [f"{shard.name}: {problem}" for problem in problems]

    def _sample_problem(self, index: SplitIndex, row: int, key: str, found: TarScan, url: str) -> str | None:
        sample = found.samples.get(key)
        place = (int(index.offset[row]), int(index.size[row]))
        if sample is None or sample.images != [place]:
            if sample is not None and sample.images:
                return "lies elsewhere than its index says"
            return _unreachable(url, *place)
        if sample.problem:
            return f"cannot be used ({sample.problem})"
        if sample.crc32 != int(index.crc32[row]):
            is_near = bin(sample.phash ^ int(index.phash[row])).count("1") <= MAX_HASH_DISTANCE
            return f"{'has other bytes' if is_near else 'shows another picture'} than when it was written"
        try:
            text = label_text(sample.labels, self.label_field)
        except ValueError as error:
            return f"has lost its label ({error})"
        is_same = is_label(text, int(index.label[row]), self.classes, self.label_kind)
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


def verify(url: str, *, workers: int = 1, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read every byte of every shard, decode every image, and hold all of it against the manifest and its indices.

    Args:
        progress: called as progress(done, total) in shards.
    Raises:
        UserError: no dataset there, or its manifest is damaged; what else is wrong is in the answer, all of it.
    """
    manifest = Manifest.open(url)
    problems: list[str] = []
    indices: dict[str, SplitIndex] = {}
    for name, split in manifest.splits.items():
        try:
            index = manifest.split(name)
            found = index_problem(
                index.shards, index.num_classes, index.shard, index.offset, index.size, index.label
            ) or _file_problem(manifest, name)
            len(index.phash), len(index.crc32), len(np.asarray(index.keys))
        except UserError as error:
            found = str(error)
        else:
            indices[name] = index
        problems += [f"{name}: {found}"] if found else []
        if name not in indices:
            problems.append(f"{name}: its {len(split.shards)} shards were not checked, for want of an index")
    adopted = manifest.recipe.get("adopted") or {}
    check = _ShardCheck(
        manifest.url, manifest.classes, indices, adopted.get("label_field"), adopted.get("labels") or "numbers"
    )
    places = [(name, number) for name, index in indices.items() for number in range(len(index.shards))]
    results: list[tuple[int, list[str]]] = []
    for result in each(check, places, workers):
        results.append(result)
        if progress is not None:
            progress(len(results), len(places))
    problems += sorted(problem for _, found_problems in results for problem in found_problems)
    num_samples = sum(index.num_samples for index in indices.values())
    return Verification(len(places), num_samples, sum(size for size, _ in results), tuple(problems))


def _file_problem(manifest: Manifest, split: str) -> str | None:
    """The bytes of the index files themselves."""
    import hashlib

    for file in (manifest.splits[split].index.columns, manifest.splits[split].index.keys):
        data = objects.read_bytes(objects.join(manifest.url, file.name), max_bytes=file.size_bytes + 1)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            return f"{file.name} has changed (SHA-256 differs)"
    return None
