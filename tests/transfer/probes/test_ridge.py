"""Few-shot ridge against a plain float64 solve, and against what the published procedure says step by step."""

import numpy as np
import pytest

from pipeline.errors import UserError
from transfer.probes.ridge import BIAS, fit_ridge, rank_selected

L2_GRID = [2.0**i for i in range(-10, 20)]


def problem(num: int, width: int, num_classes: int = 4) -> tuple[np.ndarray, ...]:
    rng = np.random.Generator(np.random.PCG64(num * width))
    centres = rng.normal(size=(num_classes, width))
    labels = np.arange(num) % num_classes
    test_labels = np.arange(50) % num_classes
    scale = rng.uniform(0.01, 30, size=width)  # features of a network have very different scales
    support = (centres[labels] + rng.normal(size=(num, width))) * scale
    test = (centres[test_labels] + rng.normal(size=(50, width))) * scale
    return support.astype(np.float32), labels, test.astype(np.float32), test_labels


def reference_scores(support: np.ndarray, labels: np.ndarray, test: np.ndarray, l2: float) -> np.ndarray:
    """(X'X + l2 I)^-1 X'Y in float64, without a factorisation."""
    x, z = support.astype(np.float64), test.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = np.hstack([(x - mean) / std, np.full((len(x), 1), 100.0)])
    z = np.hstack([(z - mean) / std, np.full((len(z), 1), 100.0)])
    y = 2.0 * np.eye(labels.max() + 1)[labels] - 1.0
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ y)
    return z @ weights


@pytest.mark.parametrize("shape", [(200, 30), (31, 30), (30, 30), (8, 120), (4, 300)])
@pytest.mark.parametrize("l2", [1.0, 1024.0, 2.0**16])
def test_scores_equal_a_plain_float64_solve(shape: tuple[int, int], l2: float) -> None:
    support, labels, test, _ = problem(*shape)
    scores = fit_ridge(support, labels, 4).scores(test, l2)
    expected = reference_scores(support, labels, test, l2)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_a_grid_of_penalties_costs_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    support, labels, test, _ = problem(40, 100)
    calls = []
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda a: calls.append(a.shape) or eigh(a))
    ridge = fit_ridge(support, labels, 4)
    assert all(np.isfinite(ridge.scores(test, l2)).all() for l2 in L2_GRID)
    assert calls == [(40, 40)]  # the smaller of N and D + 1


def test_one_image_a_class_and_constant_features_are_no_trouble() -> None:
    support, labels, test, _ = problem(4, 60)
    support[:, 7] = test[:, 7] = 3.0
    ridge = fit_ridge(support, labels, 4)
    assert np.isfinite(ridge.scores(test, 1024.0)).all()


def test_the_bias_is_a_hundred_and_hardly_penalised() -> None:
    labels = np.array([0] * 30 + [1] * 10)
    ridge = fit_ridge(np.zeros((40, 5), np.float32), labels, 2)
    # Without information the mean of the targets, -1 and 1, is predicted.
    np.testing.assert_allclose(ridge.scores(np.zeros((1, 5)), 1024.0), [[0.5, -0.5]], atol=2e-3)
    assert BIAS == 100.0


# Right answers among the last 797 of scikit-learn's digits, pixels as features, support the first images of each class among
# the first 1,000, penalties 2^-10 to 2^19; and the exponent chosen over the three tasks. Computed by the formulas of scenic's
# fewshot_utils (google-research/scenic, after big_vision's older evaluator) in jax with 64 bits.
RECORDED = {
    5: (
        5.0,
        """267 270 273 282 305 342 391 432 472 515 546 562 567 576 583
        591 586 586 579 573 571 567 570 568 567 567 567 566 566 566
        334 334 334 334 334 335 335 339 344 356 366 384 402 414 439
        459 463 457 458 457 451 444 442 439 436 436 436 436 436 436
        440 440 440 440 441 442 446 448 453 460 473 491 499 501 502
        497 495 485 490 496 492 489 492 492 492 492 492 492 492 492""",
    ),
    25: (
        6.0,
        """591 591 591 591 591 591 591 591 591 593 594 596 599 602 609
        606 611 611 612 602 592 589 578 570 563 563 562 562 562 562
        500 500 500 500 500 500 500 500 500 500 502 503 506 511 517
        528 530 523 513 484 461 455 445 437 433 432 432 432 432 432
        517 517 517 517 517 517 517 517 517 517 517 517 518 519 526
        537 542 542 540 538 532 531 527 524 522 522 521 521 521 521""",
    ),
}


@pytest.mark.parametrize("shots", RECORDED)
def test_right_answers_and_the_chosen_penalty_equal_the_published_code(shots: int) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    support = np.concatenate([np.flatnonzero(labels[:1000] == c)[:shots] for c in range(10)])
    accuracies = {}
    for name, part in (("whole", slice(64)), ("upper", slice(32)), ("lower", slice(32, 64))):
        ridge = fit_ridge(pixels[support, part].astype(np.float32), labels[support], 10)
        answers = [ridge.scores(pixels[1000:, part], l2).argmax(1) for l2 in L2_GRID]
        accuracies[name] = [float((answer == labels[1000:]).mean()) for answer in answers]
    exponent, text = RECORDED[shots]
    recorded = np.array(text.split(), int).reshape(3, 30)
    found = np.round(np.array(list(accuracies.values())) * 797)
    # Pixels that never change in the support are divided by 1e-5: at tiny penalties roundings decide an image.
    assert (found[:, 4:] == recorded[:, 4:]).all() and np.abs(found - recorded).max() <= 1
    assert rank_selected(accuracies, L2_GRID) == 2.0**exponent


def test_a_penalty_is_chosen_by_rank_and_not_by_mean_accuracy() -> None:
    accuracies = {"wide": [0.9, 0.1, 0.0], "narrow": [0.50, 0.52, 0.51], "tight": [0.30, 0.31, 0.32]}
    assert rank_selected(accuracies, [1.0, 2.0, 4.0]) == 2.0
    assert rank_selected({"equal": [0.5, 0.5, 0.5]}, [1.0, 2.0, 4.0]) == 4.0
    with pytest.raises(ValueError, match="3 accuracies a task"):
        rank_selected({"a": [0.1, 0.2]}, [1.0, 2.0, 4.0])


def test_features_that_are_not_finite_are_refused() -> None:
    support, labels, _, _ = problem(8, 5)
    support[3, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fit_ridge(support, labels, 4)
