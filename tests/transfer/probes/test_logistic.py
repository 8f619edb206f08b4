"""Logistic regression against scikit-learn's, and against what an optimum must be."""

import numpy as np
import pytest

from pipeline.errors import UserError
from transfer.probes.logistic import fit_logistic
from transfer.protocol.method_settings import LogisticSettings


def problem(num: int, width: int, num_classes: int) -> tuple[np.ndarray, ...]:
    rng = np.random.Generator(np.random.PCG64(num + num_classes))
    centres = rng.normal(size=(num_classes, width))
    labels = np.arange(num) % num_classes
    return centres[labels] + 2 * rng.normal(size=(num, width)), labels, 2 * rng.normal(size=(40, width))


@pytest.mark.parametrize("shape", [(150, 12, 5), (150, 12, 2), (20, 60, 4), (20, 60, 2)])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_probabilities_equal_scikit_learn(shape: tuple[int, int, int], c: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train, labels, test = problem(*shape)
    (head,) = fit_logistic(train, labels, shape[2], cs=[c])
    # Its L-BFGS stops when the loss changes by less than 64 roundings, which is earlier; its Newton does not.
    for solver, atol in (("lbfgs", 1e-4), ("newton-cg", 5e-5)):
        peer = LogisticRegression(C=c, solver=solver, tol=1e-10, max_iter=5000).fit(train, labels)
        np.testing.assert_allclose(head.scores(test), peer.predict_proba(test), atol=atol)


def test_a_list_of_c_gives_what_each_alone_gives_in_its_order() -> None:
    train, labels, test = problem(60, 8, 3)
    wanted = [10.0, 0.01, 1.0, 10.0]
    for head, c in zip(fit_logistic(train, labels, 3, cs=wanted), wanted, strict=True):
        (alone,) = fit_logistic(train, labels, 3, cs=[c])
        np.testing.assert_allclose(head.scores(test), alone.scores(test), atol=1e-5)


def test_the_published_grid() -> None:
    cs = LogisticSettings(split="full").cs
    assert len(cs) == 45 and cs[0] == 1e-6 and cs[-1] == 1e5 and cs[24] == pytest.approx(1.0)


def test_the_bias_is_free_and_an_extreme_penalty_leaves_the_shares_of_the_classes() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    (head,) = fit_logistic(rng.normal(size=(100, 5)), labels, 3, cs=[1e-9])
    np.testing.assert_allclose(head.scores(np.zeros((1, 5))), [[0.6, 0.3, 0.1]], atol=1e-5)


def test_broken_features_and_penalties_are_refused() -> None:
    train, labels, _ = problem(20, 4, 2)
    for cs in ([0.0], [-1.0], [float("inf")], [1.0, 0.0], []):
        with pytest.raises(UserError, match="positive"):
            fit_logistic(train, labels, 2, cs=cs)
    train[0, 0] = np.inf
    with pytest.raises(UserError, match="not finite"):
        fit_logistic(train, labels, 2, cs=[1.0])
