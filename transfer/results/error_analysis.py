"""What a cell gets wrong: its confusion over seeds, measures besides the metric, and the test images that it is surest and
wrongest about."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.format.manifest import Manifest
from pipeline.data.images.decode import DecodeError, decode_image
from pipeline.storage import objects
from transfer.measurement.prediction_measures import CALIBRATION, ORDINAL, prediction_measures
from transfer.metric_facts import facts_of
from transfer.results.statistics import Estimate, estimate
from transfer.results.sweep_results import Findings, name_of_test_split
from transfer.sweep.entry import LedgerEntry

THUMBNAIL_PX = 112
MIN_SHOWN_PX = 64
"""Smaller images are enlarged by a whole factor, so that their pixels stay pixels."""


@dataclass(frozen=True)
class Confusion:
    """Test images by label and by what was predicted, summed over seeds."""

    counts: np.ndarray
    """(C, C) int64; rows are labels."""
    num_seeds: int

    @property
    def recalls(self) -> np.ndarray:
        """(C,) float64: the share of each class that is right; not a number for a class without a test image."""
        totals = self.counts.sum(1)
        return np.divide(self.counts.diagonal(), totals, out=np.full(len(totals), np.nan), where=totals > 0)

    def worst_pairs(self, num: int) -> list[tuple[int, int, float]]:
        """(label, predicted, share of the label's images) of the most frequent confusions, by share."""
        shares = self.counts / np.maximum(1, self.counts.sum(1, keepdims=True))
        np.fill_diagonal(shares, 0.0)
        order = np.argsort(-shares, axis=None, kind="stable")[:num]
        pairs = [(int(i // len(shares)), int(i % len(shares))) for i in order]
        return [(a, b, float(shares[a, b])) for a, b in pairs if shares[a, b] > 0]


def confusion(predicted: Sequence[dict[str, np.ndarray]], num_classes: int = 0) -> Confusion:
    """Of the predictions of a cell's seeds. `num_classes` 0: as many as occur."""
    num = max([num_classes, *(int(max(p["label"].max(), p["predicted"].max())) + 1 for p in predicted)])
    counts = np.zeros((num, num), dtype=np.int64)
    for one in predicted:
        np.add.at(counts, (one["label"], one["predicted"]), 1)
    return Confusion(counts, len(predicted))


@dataclass(frozen=True)
class Mistake:
    """A test image that every seed gets wrong."""

    sample: int
    label: int
    predicted: int
    """By the surest seed."""
    confidence: float
    """Mean over seeds."""


def worst_mistakes(predicted: Sequence[dict[str, np.ndarray]], num: int) -> list[Mistake]:
    """The images that all seeds get wrong, the highest mean confidence first."""
    labels, samples = predicted[0]["label"], predicted[0]["sample"]
    wrong = np.all([p["predicted"] != labels for p in predicted], axis=0)
    shares = np.array([p["confidence"] for p in predicted], dtype=np.float64)
    mean, surest = shares.mean(0), shares.argmax(0)
    order = np.flatnonzero(wrong)[np.argsort(-mean[wrong], kind="stable")][:num]
    return [
        Mistake(int(samples[i]), int(labels[i]), int(predicted[surest[i]]["predicted"][i]), float(mean[i]))
        for i in order
    ]


@dataclass(frozen=True)
class CellMeasures:
    """What `prediction_measures` gives of a cell, over its seeds."""

    cell: str
    entry: LedgerEntry
    """Its first."""
    estimates: dict[str, Estimate]
    """By measure; of one final trial without an interval."""


def measures_of_cells(findings: Findings) -> list[CellMeasures]:
    """Of each cell whose final trials kept predictions."""
    rows = []
    for name, entries in findings.by_cell().items():
        values: dict[str, list[float]] = {}
        for entry in entries:
            if (found := findings.predicted_classes(entry)) is not None:
                kind = entry.method_kind or entry.method
                for measure, value in prediction_measures(
                    found, method_kind=kind, ordered=entry.classes_ordered
                ).items():
                    values.setdefault(measure, []).append(value)
        known = {m: estimate(values[m], within=facts_of(m).within) for m in (*CALIBRATION, *ORDINAL) if m in values}
        if known:
            rows.append(CellMeasures(name, entries[0], {m: found for m, found in known.items() if found}))
    return rows


def cell_of_mistakes(findings: Findings, task: str) -> list[LedgerEntry]:
    """The final trials of the task's best pretrained cell, of any cell where none is pretrained; those that kept predictions."""
    found = [
        kept
        for entries in findings.by_cell().values()
        if entries[0].task == task and (kept := [e for e in entries if findings.predicted_classes(e) is not None])
    ]
    mean = [sum(e.value or 0.0 for e in entries) / len(entries) for entries in found]
    order = sorted(range(len(found)), key=lambda i: (found[i][0].init == "pretrained", mean[i]))
    return found[order[-1]] if order else []


def thumbnail(manifest: Manifest, sample: int) -> str:
    """A test image as a data URI of a few kilobytes; "" where its bytes cannot be read."""
    from PIL import Image

    index = manifest.split(name_of_test_split(manifest))
    url = objects.join(manifest.url, index.shards[int(index.shard[sample])].name)
    try:
        pixels = decode_image(objects.read_range(url, int(index.offset[sample]), int(index.size[sample])))
    except (DecodeError, OSError):
        return ""
    picture = Image.fromarray(pixels)
    small = max(picture.size) < MIN_SHOWN_PX
    if small:
        factor = -(-MIN_SHOWN_PX // max(picture.size))
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    out = io.BytesIO()
    kind = "png" if small else "jpeg"
    picture.save(out, kind, **({"optimize": True} if small else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
