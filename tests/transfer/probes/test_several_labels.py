"""Cells of several labels an image: every number equals scikit-learn and NumPy, and what does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.sampling.subset import Subset, select
from pipeline.data.sources import glyph_sets as drawn
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from tests.transfer import recompute
from tests.transfer.conftest import _pixels, run_sweep
from transfer.measurement import predictions
from transfer.metrics import compute
from transfer.probes import fit
from transfer.protocol.method_settings import (
    FinetuneSettings,
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RidgeSettings,
    TeacherStage,
)
from transfer.protocol.methods import Method
from transfer.protocol.own_data import default_suite
from transfer.protocol.tasks import Task, TaskEntry, open_task
from transfer.protocol.truth import Truth
from transfer.report.write_report import write_report
from transfer.results.sweep_results import Findings, load_findings
from transfer.sweep.entry import LedgerEntry

METHODS = (
    Method(name="ridge", kind="ridge", settings=RidgeSettings(split="full", l2=64.0)),
    Method(
        name="linear", kind="linear", settings=LinearSettings(split="full", learning_rates=(1e-5, 1e-4), num_steps=60)
    ),
    Method(name="logistic", kind="logistic", settings=LogisticSettings(split="full", cs=(1e-7, 1e-6))),
    Method(name="knn", kind="knn", settings=KnnSettings(split="full", ks=(5, 20))),
)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory, glyph_sets: str) -> Findings:
    out = tmp_path_factory.mktemp("sweep") / "s"
    return load_findings(run_sweep(out, glyph_sets, methods=METHODS, num_seeds=2, card="glyph_sets"))


@pytest.fixture(scope="module")
def task(glyph_sets: str) -> Task:
    return open_task(TaskEntry(card="glyph_sets", holdout_per_class=1), str(Path(glyph_sets).parent))


def _of(findings: Findings, method: str) -> list[LedgerEntry]:
    found = [e for e in findings.finals if e.method == method and e.init == "pretrained"]
    return sorted(found, key=lambda e: e.seed)


def _images(task: Task, split: str) -> tuple[np.ndarray, np.ndarray]:
    x, labels = _pixels(task, split)
    return x.astype(np.float64), task.truth.of(labels)


def test_the_truth_is_what_the_pictures_show(task: Task) -> None:
    _, truth = _images(task, "test")
    shares = np.mean([[label in drawn.shown(i) for label in drawn.LABELS] for i in range(700, 1000)], 0)
    np.testing.assert_allclose((truth == 1).mean(0), shares)


def test_ridge_and_logistic_regression(findings: Findings, task: Task) -> None:
    fitted = [np.concatenate(parts) for parts in zip(_images(task, "train"), _images(task, "val"), strict=True)]
    x, test = _images(task, "test")
    (ridge,), (logistic,) = _of(findings, "ridge"), _of(findings, "logistic")
    c = logistic.hyperparameters["c"]
    for entry, scores, tolerance in (
        (ridge, recompute.ridge_of_labels(*fitted, x, 64.0), 1e-6),
        (logistic, recompute.logistic_of_labels(*fitted, x, c), 1e-3),
    ):
        expected = {
            "map11": recompute.precision_at_recalls(scores, test, 11),
            "map_area": recompute.precision_at_recalls(scores, test, 0),
            "map": recompute.average_precision(scores, test),
            "auroc": recompute.auroc_of_labels(scores, test),
        }
        assert entry.metrics == pytest.approx(expected, abs=tolerance) and entry.metric == "map11"
        assert entry.value == entry.metrics["map11"] and entry.num_train == 700 and entry.num_test == 300
        assert entry.test_interval is not None and entry.test_interval["rule"] == "bootstrap"
        assert entry.test_interval["low"] < entry.value < entry.test_interval["high"]
        share = float((test == 1).mean(0).mean())
        assert entry.baselines["prevalence"] == pytest.approx(share) and share < entry.baselines["chance"] < entry.value


def test_neighbours(findings: Findings, task: Task) -> None:
    fitted = [np.concatenate(parts) for parts in zip(_images(task, "train"), _images(task, "val"), strict=True)]
    x, test = _images(task, "test")
    (entry,) = _of(findings, "knn")
    k, kept = entry.hyperparameters["k"], findings.predictions(entry)
    assert kept is not None and entry.value == entry.metrics[f"map11_k{k}"] and "map11_k5" in entry.metrics
    drawn_on = x.any(1)  # to an empty picture all others are equally near
    expected = recompute.neighbours_of_labels(*fitted, x[drawn_on], k)
    np.testing.assert_allclose(kept["scores"][drawn_on], expected, atol=1e-4)  # cosines are of float32
    ordered = kept["scores"] - 1e-9 * np.arange(len(x))[:, None]
    assert entry.value == pytest.approx(recompute.precision_at_recalls(ordered, test, 11), abs=1e-2)
    assert entry.metrics["map"] == pytest.approx(recompute.average_precision(kept["scores"], test), abs=1e-12)


def test_every_metric_follows_from_what_is_kept(findings: Findings) -> None:
    for entry in findings.finals:
        found = findings.predictions(entry)
        assert found is not None and findings.predicted_classes(entry) is None
        plain = {name: value for name, value in entry.metrics.items() if "_k" not in name}
        assert {name: predictions.recomputed(name, found) for name in plain} == plain
    assert len(_of(findings, "linear")) == 2  # its head begins at a draw


def test_a_report_has_rows_of_its_unit(findings: Findings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(findings.folders[0].url, tmp_path)
    shown = capsys.readouterr().out
    assert "mAP-11, %" in shown and "prevalence 1" in shown and "bootstrap" in shown
    assert "mAP-11" in (tmp_path / "scorecard.html").read_text()


def test_what_is_not_said_is_left_out_of_every_head() -> None:
    rng = np.random.default_rng(0)
    x, test = rng.normal(size=(90, 6)), rng.normal(size=(20, 6))
    truth = rng.integers(-1, 2, (90, 3))
    for method, point, expected in (
        (METHODS[0], {"l2": 2.0}, recompute.ridge_of_labels(x, truth, test, 2.0)),
        (METHODS[2], {"c": 0.5}, recompute.logistic_of_labels(x, truth, test, 0.5)),
        (METHODS[3], {"k": 3}, recompute.neighbours_of_labels(x, truth, test, 3)),
    ):
        (scores,) = fit.fit(method, [point], x, truth, 3, seed=0)(test)
        np.testing.assert_allclose(scores, expected, atol=1e-6 if method.kind != "knn" else 2e-5)
    assert (scores == 0.5).any()  # of three neighbours none says anything of a label somewhere


def test_neighbours_of_several_labels_are_scikit_learns_of_several_outputs() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(4)
    x, test, truth = rng.normal(size=(90, 6)), rng.normal(size=(20, 6)), rng.integers(0, 2, (90, 3))
    peer = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(x, truth)
    (scores,) = fit.fit(METHODS[3], [{"k": 7}], x, truth, 3, seed=0)(test)
    np.testing.assert_allclose(scores, np.stack(peer.predict_proba(test), 1)[..., 1], atol=2e-5)


def test_the_linear_probe_is_torchs_sgd_on_binary_cross_entropies() -> None:
    import torch

    rng = np.random.default_rng(1)
    x, truth = rng.normal(size=(12, 3)).astype(np.float32), rng.integers(-1, 2, (12, 4))
    method = Method(name="l", kind="linear", settings=LinearSettings(split="full", num_steps=9, batch=12))
    (ours,) = fit.fit(method, [{"learning_rate": 2.0}], x, truth, 4, seed=3)(x)
    first = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).mul_(0.01)
    weight, bias = first.requires_grad_(), torch.zeros(4, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=2.0 * 12 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 0.5 * (1 + np.cos(np.pi * t / 9)))
    said, aims = torch.tensor(truth >= 0), torch.tensor(truth).float()
    for _ in range(9):
        optimiser.zero_grad()
        logits = torch.tensor(x) @ weight + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[said], aims[said], reduction="sum") / 12
        loss.backward()
        optimiser.step()
        schedule.step()
    np.testing.assert_allclose(ours, (torch.tensor(x) @ weight + bias).detach().numpy(), atol=1e-5)


def test_average_precision_and_auroc_with_ties_are_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    scores, truth = rng.normal(size=(80, 5)).round(1), rng.integers(-1, 2, (80, 5))
    assert compute("map", scores, truth) == pytest.approx(recompute.average_precision(scores, truth), abs=1e-12)
    assert compute("auroc", scores, truth) == pytest.approx(recompute.auroc_of_labels(scores, truth), abs=1e-12)
    distinct = scores + rng.random(scores.shape) * 1e-3
    for name, points in (("map11", 11), ("map_area", 0)):
        expected = recompute.precision_at_recalls(distinct, truth, points)
        assert compute(name, distinct, truth) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(UserError, match="with and without one of the labels"):
        compute("auroc", scores, np.ones((80, 5), int))


def test_what_does_not_fit_is_said_before_a_trial(task: Task) -> None:
    assert "set split: full" in (task.cannot(RidgeSettings(shots=(5,)), 5) or "")
    assert "set metric to one of map11" in (task.cannot(RidgeSettings(split="full", metric="top1"), 0) or "")
    teacher = TeacherStage(model="nfnet_tiny", epochs=1.0)
    taught = FinetuneSettings(split="full", learning_rates=(0.1,), num_steps=(3,), teacher=teacher)
    assert "a teacher's softmax is over one class an image" in (task.cannot(taught, 0) or "")
    assert task.cannot(replace(taught, teacher=None), 0) is None
    one_label = replace(task, truth=Truth(), card=load_card("digits"))
    assert "is not of one class an image" in (one_label.cannot(RidgeSettings(split="full", metric="map"), 0) or "")


def test_images_without_a_suite_get_whole_methods_and_mean_average_precision(glyph_sets: str) -> None:
    suite, said = default_suite([glyph_sets])
    assert [m.kind for m in suite.methods] == ["ridge", "knn", "logistic"] and suite.methods[0].settings.split == "full"
    assert said[0] == "glyph_sets: 600 training images, 10 labels, the rarest is shown by 48"


def test_parts_are_drawn_over_all_images_as_one_class(task: Task) -> None:
    no_val = replace(task, val_split="", num_val=0)
    parts = no_val.parts(METHODS[0].settings, 0, 0)
    labels = no_val.truth.strata(no_val.train_labels)
    drawn = [select(labels, part.subset) for part in (parts.search, parts.holdout) if isinstance(part.subset, Subset)]
    assert [len(d) for d in drawn] == [540, 60] == [parts.search.num, parts.holdout.num]
    assert not set(drawn[0]) & set(drawn[1])
