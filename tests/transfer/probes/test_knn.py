"""kNN against a loop over images that follows the published description, and scikit-learn's neighbours."""

import numpy as np
import pytest

from pipeline.errors import UserError
from transfer.probes import knn
from transfer.probes.knn import Knn, fit_knn
from transfer.protocol.method_settings import KnnSettings

GRID = KnnSettings(split="full").ks


def problem(num: int = 300, width: int = 24, num_classes: int = 5) -> tuple[np.ndarray, ...]:
    rng = np.random.Generator(np.random.PCG64(3))
    centres = rng.normal(size=(num_classes, width))
    labels, test_labels = np.arange(num) % num_classes, np.arange(70) % num_classes
    train = (centres[labels] + 1.5 * rng.normal(size=(num, width))) * rng.uniform(0.1, 9, size=(num, 1))
    test = centres[test_labels] + 1.5 * rng.normal(size=(70, width))
    return train.astype(np.float32), labels, test.astype(np.float32), test_labels


def scores_of(fitted: Knn, features: np.ndarray, k: int, temperature: float = 0.07) -> np.ndarray:
    return fitted.scores_of(features, [k], temperature=temperature)[k]


def by_hand(train: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int, temperature: float) -> np.ndarray:
    train, query = train.astype(np.float64), query.astype(np.float64)
    cosine = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
    nearest = np.argsort(-cosine)[:k]
    weights = np.exp(cosine[nearest] / temperature)
    return np.array([weights[labels[nearest] == c].sum() for c in range(5)]) / weights.sum()


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_votes_equal_the_description_image_by_image(temperature: float) -> None:
    train, labels, test, _ = problem()
    fitted = fit_knn(train, labels, 5)
    for k in (1, 10, 20, 100, 200):
        expected = np.array([by_hand(train, labels, query, k, temperature) for query in test])
        np.testing.assert_allclose(scores_of(fitted, test, k, temperature), expected, atol=2e-5)


def test_answers_equal_scikit_learns_weighted_neighbours() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train, labels, test, _ = problem()
    peer = KNeighborsClassifier(20, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(train, labels)
    np.testing.assert_array_equal(scores_of(fit_knn(train, labels, 5), test, 20).argmax(1), peer.predict(test))


def test_the_length_of_a_feature_does_not_count() -> None:
    train, labels, test, _ = problem()
    fitted = fit_knn(train * 100, labels, 5)
    expected = scores_of(fit_knn(train, labels, 5), test, 10)
    np.testing.assert_allclose(scores_of(fitted, test / 7, 10), expected, atol=1e-5)


def test_a_grid_of_k_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, _ = problem()
    fitted = fit_knn(train, labels, 5)
    grid = fitted.scores_of(test, GRID, temperature=0.07)
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", 3 * len(train))
    for k in GRID:
        np.testing.assert_allclose(scores_of(fitted, test, k), grid[k], atol=1e-6)
        np.testing.assert_allclose(grid[k].sum(1), 1.0, atol=1e-12)


def test_a_class_without_training_images_gets_no_vote() -> None:
    train, labels, test, _ = problem()
    assert (scores_of(fit_knn(train, labels, 7), test, 50)[:, 5:] == 0).all()


def test_more_neighbours_than_images_and_broken_features_are_refused() -> None:
    train, labels, test, _ = problem()
    with pytest.raises(UserError, match=r"301 nearest neighbours.*choose k from 1 to 300"):
        scores_of(fit_knn(train, labels, 5), test, 301)
    with pytest.raises(UserError, match="not finite"):
        fit_knn(np.full_like(train, np.inf), labels, 5)
