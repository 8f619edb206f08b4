"""What a number is read against: guessing, and other test images."""

import numpy as np
import pytest
from scipy import stats
from sklearn.dummy import DummyClassifier
from sklearn.metrics import balanced_accuracy_score

from transfer.measurement.reference_values import baselines, bootstrap, image_interval, wilson


@pytest.mark.parametrize(("right", "num"), [(0, 10), (7, 20), (981, 1000), (50, 50)])
def test_wilsons_interval_is_scipys(right: int, num: int) -> None:
    theirs = stats.binomtest(right, num).proportion_ci(0.95, method="wilson")
    assert wilson(right / num, num) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_baselines_are_what_scikit_learns_dummies_reach() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.choice(3, 90, p=[0.2, 0.7, 0.1]), rng.choice(3, 60, p=[0.5, 0.4, 0.1])
    scores, images = rng.normal(size=(60, 3)), np.zeros((90, 1))
    dummy = DummyClassifier(strategy="most_frequent").fit(images, train)
    found = baselines("top1", scores, test, train)
    assert found == pytest.approx({"chance": 1 / 3, "majority": dummy.score(np.zeros((60, 1)), test)})
    per_class = baselines("balanced_accuracy", scores, test, train)
    assert per_class["majority"] == pytest.approx(balanced_accuracy_score(test, dummy.predict(np.zeros((60, 1)))))
    assert baselines("auroc", scores, test, train) == pytest.approx({"chance": 0.5, "majority": 0.5})


def test_the_interval_of_test_images_is_wilsons_for_shares_and_else_a_bootstraps() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)
    scores = np.eye(2)[labels] + rng.normal(0, 0.8, (400, 2))
    right = (scores.argmax(1) == labels).mean()
    low, high = wilson(right, 400)
    assert image_interval("top1", scores, labels) == {"low": low, "high": high, "rule": "wilson"}
    area = image_interval("auroc", scores, labels)
    assert area["rule"] == "bootstrap" and 0 <= area["low"] < area["high"] <= 1
    assert image_interval("auroc", scores, labels) == area  # a function of the scores
    # Of a mean of images in one class the bootstrap's is the normal approximation's.
    x = rng.random(400)
    found = bootstrap(lambda chosen: float(x[chosen].mean()), np.zeros(400, int), 400)
    assert found == pytest.approx(stats.norm.interval(0.95, x.mean(), x.std() / 20), abs=0.003)
