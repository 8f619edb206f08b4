"""Metrics against scikit-learn, by hand where it has none, and at their corners: ties, absent classes, wrong input."""

import numpy as np
import pytest

from pipeline.errors import UserError
from transfer.metrics import compute, recalls


def problem(num: int = 400, num_classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(num_classes))
    labels = rng.choice(num_classes, num, p=rng.dirichlet(np.full(num_classes, 2.0)))
    scores = rng.normal(size=(num, num_classes)) + np.diag(np.linspace(0, 2.5, num_classes))[labels]  # some are harder
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True), labels


def test_accuracies_equal_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    scores, labels = problem()
    for name, k in (("top1", 1), ("top5", 5)):
        assert compute(name, scores, labels) == pytest.approx(
            top_k_accuracy_score(labels, scores, k=k, labels=np.arange(7)), abs=1e-12
        )
    expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert compute("mean_per_class", scores, labels) == pytest.approx(expected, abs=1e-12)
    assert compute("balanced_accuracy", scores, labels) == compute("mean_per_class", scores, labels)
    assert abs(expected - compute("top1", scores, labels)) > 0.01  # the classes are unequal: the names differ


def test_auroc_equals_scikit_learn_with_ties_too() -> None:
    from sklearn.metrics import roc_auc_score

    for digits in (12, 1):
        scores, labels = problem(num_classes=2)
        scores = scores.round(digits)
        assert compute("auroc", scores, labels) == pytest.approx(roc_auc_score(labels, scores[:, 1]), abs=1e-12)
        scores, labels = problem()
        expected = np.mean([roc_auc_score(labels == c, scores.round(digits)[:, c]) for c in range(7)])
        assert compute("auroc", scores.round(digits), labels) == pytest.approx(expected, abs=1e-12)
    assert compute("auroc", *problem()) == pytest.approx(
        roc_auc_score(problem()[1], problem()[0], multi_class="ovr"), abs=1e-12
    )


def test_two_classes_need_no_probabilities_for_auroc() -> None:
    scores, labels = problem(num_classes=2)
    logits = np.log(scores) + np.arange(len(scores))[:, None]  # each row by another constant
    assert compute("auroc", logits, labels) == pytest.approx(compute("auroc", scores, labels), abs=1e-12)


def test_a_head_that_says_the_same_about_all_gets_chance() -> None:
    labels = np.array([0] * 80 + [1] * 15 + [2] * 5)
    same = np.zeros((100, 10))
    assert compute("top1", same, labels) == pytest.approx(0.1)
    assert compute("top5", same, labels) == pytest.approx(0.5)
    assert compute("mean_per_class", same, labels) == pytest.approx(0.1)
    assert compute("auroc", same, labels) == 0.5
    assert compute("real", same, [[0, 3], [7, 7]] * 50) == pytest.approx(0.15)


def test_classes_that_the_split_lacks_leave_means_over_classes() -> None:
    scores = np.eye(4)[[0, 0, 2, 3]]
    labels = np.array([0, 0, 2, 2])
    assert compute("mean_per_class", scores, labels) == 0.75
    assert np.isnan(recalls(scores, labels)).tolist() == [False, True, False, True]
    assert compute("auroc", scores, labels) == pytest.approx((1.0 + 0.75) / 2)
    with pytest.raises(UserError, match="two classes"):
        compute("auroc", scores, np.zeros(4, int))


def test_top5_with_fewer_classes_is_certain() -> None:
    scores, labels = problem(num_classes=3)
    assert compute("top5", scores, labels) == 1.0


def test_map11_by_hand() -> None:
    # One class; by rank right, wrong, right, wrong: precision 1 up to recall 1/2, then 2/3. A difficult one is skipped.
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.95])
    labels = np.array([1, 0, 1, 0, -1])
    scores, both = np.stack([values, -values], 1), np.stack([labels, np.full(5, -1)], 1)
    assert compute("map11", scores, both) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    perfect = np.stack([labels, 1 - np.abs(labels)], 1).clip(0)
    assert compute("map11", perfect.astype(float), perfect) == 1.0


def test_map11_takes_its_last_point_at_a_recall_of_all() -> None:
    """Of 20 images with the class the last comes after one without: only the point at recall 1 sees that."""
    scores = np.stack([np.arange(21.0)[::-1]] * 2, axis=1)
    labels = np.stack([[*[1] * 19, 0, 1], [-1] * 21], axis=1)
    assert compute("map11", scores, labels) == pytest.approx((10 + 20 / 21) / 11)


def test_map11_of_a_constant_is_the_share_of_the_class() -> None:
    labels = np.zeros((50, 2), int)
    labels[:10, 0] = labels[:25, 1] = 1
    assert compute("map11", np.zeros((50, 2)), labels) == pytest.approx((0.2 + 0.5) / 2)


def test_real_counts_any_right_label_and_leaves_out_images_without() -> None:
    scores = np.eye(5)[[0, 1, 2, 3]]
    assert compute("real", scores, [[0, 4], [2], [], [3]]) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="all sets are empty"):
        compute("real", scores, [[], [], [], []])


@pytest.mark.parametrize(
    ("name", "scores", "labels", "message"),
    [
        ("f1", np.zeros((2, 2)), np.zeros(2, int), "choose one of top1"),
        ("top1", np.zeros((2, 2)), np.zeros(3, int), "3 labels"),
        ("top1", np.zeros((0, 2)), np.zeros(0, int), "0 labels"),
        ("top1", np.full((2, 2), np.nan), np.zeros(2, int), "2 images have scores that are not a number"),
        ("top1", np.zeros((2, 2)), np.array([0, 2]), "from 0 to 2"),
        ("top1", np.zeros((2, 2)), np.array([0.0, 1.0]), "class index"),
        ("map11", np.zeros((2, 2)), np.zeros(2, int), "map11 needs labels"),
        ("real", np.zeros((1, 2)), [[2]], "not all among the 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(name, scores, labels, message) -> None:
    with pytest.raises(UserError, match=message):
        compute(name, scores, labels)
