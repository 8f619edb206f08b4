"""Test images that were in the upstream set, and what a score is without them.

Reads what `normfree data overlap UPSTREAM DATASET --out FILE` wrote, and the predictions that final trials kept: nothing is run
again. A head that has seen a test image with other labels may still know it, so the number without these images is the safe one.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import documents
from pipeline.display import csv_cell
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.measurement.predictions import recomputed
from transfer.metric_facts import MetricFacts, facts_of
from transfer.results.statistics import Estimate, estimate, paired
from transfer.results.sweep_results import Findings, name_of_test_split

MAX_BYTES = 256 << 20
"""Of a file of pairs: about two millions of them."""


@dataclass(frozen=True)
class Upstream:
    """The test images of a task that are in the upstream set."""

    task: str
    file: str
    samples: np.ndarray
    """(K,) int64, places in the test split's index, rising."""
    num_test: int

    @property
    def share(self) -> float:
        return len(self.samples) / max(1, self.num_test)


@dataclass(frozen=True)
class Cleaned:
    """The score of a cell on all test images, on those that are not upstream, and on those that are."""

    cell: str
    metric: str
    whole: Estimate | None
    without: Estimate | None
    """None where every test image is upstream."""
    only: Estimate | None
    """None where none is."""
    change: Estimate | None
    """Without minus whole, paired by seed."""

    @property
    def facts(self) -> MetricFacts:
        return facts_of(self.metric)


def read_overlaps(words: Sequence[str], findings: Findings) -> dict[str, Upstream]:
    """By task, from words TASK=FILE, or FILE where its name is the task's or there is one task.

    Raises:
        UserError: no such file or task, a file that `data overlap` did not write, data that cannot be read, or keys that the
            test split does not have.
    """
    tasks = sorted({cell.task for cell in findings.finals})
    found: dict[str, Upstream] = {}
    for word in words:
        task, equals, file = word.partition("=")
        if not equals:
            file, stem = word, word.rpartition("/")[2].rpartition(".")[0]
            task = tasks[0] if len(tasks) == 1 else stem
        if task not in tasks:
            raise UserError(
                f"--overlap {word}: no task is called {task!r}; write TASK=FILE with one of {', '.join(tasks)}"
            )
        if task in found:
            raise UserError(f"--overlap {word}: {task} has a file already ({found[task].file}); give one a task")
        found[task] = _upstream(task, file, findings)
    return found


def _upstream(task: str, file: str, findings: Findings) -> Upstream:
    data = findings.datasets[task]
    if isinstance(data, str):
        raise UserError(f"--overlap {file}: the test images of {task} cannot be named ({data}); restore the data")
    split = name_of_test_split(data)
    index, pairs = data.split(split), _pairs(file)
    keys = {key for name, key in pairs if name == split}
    written = str if file.endswith(".json") else csv_cell  # as `data overlap` writes a key
    if pairs and not keys:
        listed = ", ".join(sorted({name for name, _ in pairs}))
        raise UserError(f"--overlap {file} is about {listed} of its second dataset; compare with --split-b {split}")
    samples = np.array([place for place, key in enumerate(index.keys) if written(str(key)) in keys], dtype=np.int64)
    if len(samples) < len(keys):
        raise UserError(
            f"--overlap {file} names {len(keys) - len(samples)} images that {split} of {data.url} does not have; give the "
            f"file of 'normfree data overlap UPSTREAM {data.url}'"
        )
    return Upstream(task, file, samples, index.num_samples)


@dataclass(frozen=True)
class _Pair:
    split_b: str
    key_b: str


@dataclass(frozen=True)
class _Overlap:
    pairs: list[_Pair]


def _pairs(file: str) -> list[tuple[str, str]]:
    """(split, key) of each image of the second dataset."""
    remedy = "give what 'normfree data overlap' writes with --out"
    try:
        if file.endswith(".json"):
            found = documents.read(file, _Overlap, max_bytes=MAX_BYTES, remedy=remedy)
            return [(pair.split_b, pair.key_b) for pair in found.pairs]
        data = objects.read_bytes(file, max_bytes=MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"no file {file}; --overlap wants what 'normfree data overlap' wrote with --out") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{file} is larger than {MAX_BYTES >> 20} MiB, which no such file is; {remedy}")
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        if not {"split_b", "key_b"} <= set(reader.fieldnames or ()):
            raise KeyError("split_b")
        return [(row["split_b"] or "", row["key_b"] or "") for row in reader]
    except (ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{file} is not what 'normfree data overlap' writes with --out ({error!r}); make it again"
        ) from None


def cleaned(findings: Findings, upstream: Upstream) -> list[Cleaned]:
    """The cells of a task with and without the upstream images, from the predictions of their final trials."""
    rows = []
    for name, entries in findings.by_cell().items():
        if entries[0].task != upstream.task:
            continue
        parts: tuple[dict[int, float], ...] = ({}, {}, {})
        for entry in entries:
            predicted = findings.predictions(entry)
            if predicted is None:
                continue
            seen = np.isin(predicted["sample"], upstream.samples)
            for part, keep in zip(parts, (np.ones_like(seen), ~seen, seen), strict=True):
                value = recomputed(entry.metric, predicted, keep)
                if value is not None:
                    part[entry.seed] = value
        if parts[0]:
            within = facts_of(entries[0].metric).within
            whole, without, only = (estimate(list(part.values()), within=within) for part in parts)
            rows.append(Cleaned(name, entries[0].metric, whole, without, only, paired(parts[1], parts[0])))
    return rows
