"""Measures besides the metric equal scikit-learn's and the papers' formulas (`tests.transfer.recompute`), on kept predictions."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from tests.transfer import recompute
from tests.transfer.conftest import _pixels
from transfer.measurement import predictions
from transfer.measurement.prediction_measures import prediction_measures
from transfer.protocol.tasks import TaskEntry, open_task
from transfer.report.html_errors import measures
from transfer.report.scorecard_csv import measures_to_csv
from transfer.results.error_analysis import measures_of_cells
from transfer.results.sweep_results import load_findings


def kept(place: Path, scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    predictions.write(str(place), "d", np.arange(len(labels)), scores, labels)
    return predictions.read(str(place), "d")


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 6.0])
def test_measures_are_those_of_public_formulas(tmp_path: Path, sharpness: float) -> None:
    draw = np.random.default_rng(3)
    labels = draw.integers(0, 6, 801)
    scores = sharpness * (draw.normal(size=(801, 6)) + 1.5 * np.eye(6)[labels])
    found = prediction_measures(kept(tmp_path, scores, labels), method_kind="linear", ordered=True)
    shares = recompute.shares(scores)
    expected = {
        "ece15": recompute.calibration_error(shares, labels),
        "accuracy_at_80": recompute.selective(shares, labels),
        "kappa2": recompute.quadratic_kappa(scores, labels),
        "mae": recompute.absolute_error(scores, labels),
    }
    assert found == pytest.approx(expected, abs=1e-6)  # confidence is kept as float32


def test_answers_that_are_equally_sure_share_the_places(tmp_path: Path) -> None:
    labels = np.array([0] * 5 + [1] * 5)
    scores = np.tile([1.0, 0.0], (10, 1))
    found = prediction_measures(kept(tmp_path, scores, labels), method_kind="linear", ordered=True)
    assert found["accuracy_at_80"] == pytest.approx(0.5) and found["kappa2"] == pytest.approx(0.0)
    alone = prediction_measures(kept(tmp_path / "b", scores[:5], labels[:5]), method_kind="ridge", ordered=True)
    assert alone == {"accuracy_at_80": 1.0, "mae": 0.0}  # ridge has no probabilities; one class has no kappa


def test_cells_of_a_sweep_show_what_images_and_scikit_learn_give(digits_sweep: Path, digits: str) -> None:
    findings = load_findings(digits_sweep)
    test, labels = _pixels(open_task(TaskEntry(card="digits", holdout_per_class=10), str(Path(digits).parent)), "val")
    rows = measures_of_cells(replace(findings, cells=[replace(e, classes_ordered=True) for e in findings.cells]))
    assert {row.cell for row in rows} == set(findings.by_cell()) and len(labels) == len(test)
    for row in rows:
        said = [predictions.read(str(digits_sweep), e.digest) for e in findings.by_cell()[row.cell]]
        one_hot = [np.eye(10)[found["predicted"]] for found in said]
        for name, formula in (("kappa2", recompute.quadratic_kappa), ("mae", recompute.absolute_error)):
            assert row.estimates[name].mean == pytest.approx(np.mean([formula(o, labels) for o in one_hot]), abs=1e-12)
        assert ("ece15" in row.estimates) == (row.entry.method == "knn") and row.estimates["mae"].n == len(said)
    lines = list(csv.DictReader(io.StringIO(measures_to_csv(rows))))
    assert len(lines) == sum(len(row.estimates) for row in rows)
    page = measures(rows)
    assert all(words in page for words in ("ECE, 15 bins, %", "top-1 at 80 % coverage, %", "kappa", "MAE, classes"))
    assert "kappa" not in measures(measures_of_cells(findings))  # digits are names, not steps


def test_an_order_needs_classes_in_an_order() -> None:
    assert load_card("vtab_retinopathy").ordered and not load_card("digits").ordered
    with pytest.raises(UserError, match="ordered is true, which needs classes in their order"):
        replace(load_card("pets"), ordered=True)
