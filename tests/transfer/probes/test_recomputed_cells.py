"""Every number of a probe's cells equals what NumPy and scikit-learn give on the same images (`tests.transfer.recompute`)."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.format.manifest import Manifest
from pipeline.data.sampling.subset import Subset, select
from tests.transfer import recompute
from tests.transfer.conftest import _pixels, run_sweep
from transfer.probes import fit
from transfer.protocol.method_settings import KnnSettings, LogisticSettings, RidgeSettings
from transfer.protocol.methods import Method
from transfer.protocol.tasks import Task, TaskEntry, open_task
from transfer.results.sweep_results import load_findings
from transfer.sweep.entry import LedgerEntry

METHODS = (
    Method(name="ridge", kind="ridge", settings=RidgeSettings(shots=(5,), l2=64.0)),
    Method(name="knn", kind="knn", settings=KnnSettings(shots=(25,), ks=(10, 20, 100))),
    Method(name="knn_all", kind="knn", settings=KnnSettings(split="full", ks=(10, 200))),
    Method(name="logistic", kind="logistic", settings=LogisticSettings(split="full", cs=(1e-7, 1e-6))),
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, digits: str) -> dict[str, list[LedgerEntry]]:
    found: dict[str, list[LedgerEntry]] = {}
    for entry in load_findings(
        run_sweep(tmp_path_factory.mktemp("r") / "s", digits, methods=METHODS, num_seeds=2)
    ).finals:
        if entry.init == "pretrained":
            found.setdefault(entry.method, []).append(entry)
    return {name: sorted(entries, key=lambda e: e.seed) for name, entries in found.items()}


@pytest.fixture(scope="module")
def task(digits: str) -> Task:
    return open_task(TaskEntry(card="digits", holdout_per_class=10), str(Path(digits).parent))


def supports(task: Task, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _pixels(task, "train")
    chosen = np.arange(len(y)) if not shots else select(y, Subset(per_class=shots, holdout_per_class=10, seed=seed))
    return x[chosen].astype(np.float64), y[chosen]


def agree(entry: LedgerEntry, scores: np.ndarray, labels: np.ndarray) -> None:
    assert entry.metrics["top1"] == pytest.approx(recompute.top1(scores, labels), abs=1e-12)
    assert entry.metrics["mean_per_class"] == pytest.approx(recompute.balanced(scores, labels), abs=1e-12)
    assert entry.metrics["auroc"] == pytest.approx(recompute.auroc(scores, labels), abs=1e-5)  # of float32 cosines
    often = np.bincount(labels).max() / len(labels)
    assert entry.baselines["chance"] == pytest.approx(0.1) and 0 < entry.baselines["majority"] <= often


def test_ridge(cells: dict[str, list[LedgerEntry]], task: Task) -> None:
    test, labels = _pixels(task, "val")
    assert [e.seed for e in cells["ridge"]] == [0, 1]
    for entry in cells["ridge"]:
        agree(entry, recompute.ridge(*supports(task, 5, entry.seed), test.astype(np.float64), 10, 64.0), labels)


def test_every_k_of_the_neighbours_is_reported(cells: dict[str, list[LedgerEntry]], task: Task) -> None:
    test, labels = _pixels(task, "val")
    for entry in cells["knn"]:
        # With 25 images a class k is 10, 20 and 25 itself, as in dinov2/eval/knn.py, and never 100.
        found = {int(name.rpartition("_k")[2]): value for name, value in entry.metrics.items() if "_k" in name}
        x, y = supports(task, 25, entry.seed)
        scores = {k: recompute.neighbours(x, y, test.astype(np.float64), 10, k) for k in (10, 20, 25)}
        assert found == pytest.approx({k: recompute.top1(s, labels) for k, s in scores.items()}, abs=1e-12)
        agree(entry, scores[entry.hyperparameters["k"]], labels)


def test_where_nothing_is_drawn_there_is_one_final_trial_with_wilsons_interval(
    cells: dict[str, list[LedgerEntry]], task: Task
) -> None:
    test, labels = _pixels(task, "val")
    x, y = supports(task, 0, 0)
    (knn,), (logistic,) = cells["knn_all"], cells["logistic"]
    agree(knn, recompute.neighbours(x, y, test.astype(np.float64), 10, knn.hyperparameters["k"]), labels)
    scores = recompute.logistic(x, y, test.astype(np.float64), logistic.hyperparameters["c"])
    assert logistic.value == pytest.approx(recompute.top1(scores, labels), abs=1 / len(labels))
    for entry in (knn, logistic):
        assert entry.test_interval is not None and entry.test_interval["rule"] == "wilson" and entry.value is not None
        assert entry.test_interval["low"] < entry.value < entry.test_interval["high"]


def test_logistic_regression_takes_features_as_they_are_unless_a_suite_says_otherwise(task: Task) -> None:
    x, y = supports(task, 25, 0)
    test = _pixels(task, "val")[0].astype(np.float64)
    for unit, c in ((False, 1e-6), (True, 1.0)):  # pixels run to 255
        settings = LogisticSettings(split="full", cs=(c,), unit_features=unit)
        method = Method(name="l", kind="logistic", settings=settings)
        (ours,) = fit.fit(method, [{"c": c}], x, y, 10, seed=0)(test)
        scale = (lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)) if unit else (lambda z: z)
        np.testing.assert_allclose(ours, recompute.logistic(scale(x), y, scale(test), c), atol=1e-4)
    assert Manifest.open(task.url).digest == task.data_digest
