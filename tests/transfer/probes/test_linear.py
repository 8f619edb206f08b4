"""The linear probe against torch's own layer, optimiser and schedule, one head at a time."""

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from transfer.probes import linear
from transfer.probes.linear import fit_linear, scores_of
from transfer.protocol.method_settings import LinearSettings

GRID = LinearSettings(split="full").learning_rates


def problem(num: int, width: int = 40, num_classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(num))
    labels = np.arange(num) % num_classes
    return (rng.normal(size=(num_classes, width))[labels] + rng.normal(size=(num, width))).astype(np.float32), labels


def other() -> torch.Tensor:
    """Images that the training ones do not span."""
    return torch.randn(10, 40, generator=torch.Generator().manual_seed(9))


def by_torch(
    features: np.ndarray, labels: np.ndarray, rate: float, num_steps: int, batch: int, seed: int
) -> np.ndarray:
    """The same draws, then what DINOv2's script does: Linear, CrossEntropyLoss, SGD, CosineAnnealingLR."""
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(x.shape[1], 6)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(x.shape[1], 6, generator=generator).T)
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), rate * batch / 256, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=0)
    order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(num_steps * batch // len(x) + 1)])
    for step in range(num_steps):
        chosen = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return layer(torch.cat([x, other()])).detach().numpy()


@pytest.mark.parametrize(("num", "batch"), [(200, 32), (30, 16), (30, 30)])  # 30 images span less than 40 dimensions
def test_each_head_equals_the_one_that_torch_trains(num: int, batch: int) -> None:
    features, labels = problem(num)
    grid = (0.01, 0.1, 1.0)
    heads = fit_linear(features, labels, 6, grid=grid, num_steps=60, batch=batch, seed=5)
    for head, rate in zip(heads, grid, strict=True):
        expected = by_torch(features, labels, rate, 60, batch, 5)
        (found,) = scores_of([head], np.vstack([features, other()]))
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_a_head_is_the_same_in_any_grid_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = problem(100)
    settings = {"num_steps": 30, "batch": 25, "seed": 0}
    heads = fit_linear(features, labels, 6, grid=GRID, **settings)
    [alone] = fit_linear(features, labels, 6, grid=[GRID[7]], **settings)
    np.testing.assert_allclose(heads[7].weight, alone.weight, atol=1e-6)
    monkeypatch.setattr(linear, "GROUP_ELEMENTS", 5 * 40 * 6)
    for a, b in zip(heads, fit_linear(features, labels, 6, grid=GRID, **settings), strict=True):
        np.testing.assert_allclose(a.weight, b.weight, atol=1e-6)


def test_a_rate_that_is_too_large_hurts_its_own_head_only() -> None:
    features, labels = problem(100)
    heads = fit_linear(features, labels, 6, grid=[0.1, 1e38], num_steps=40, batch=50, seed=1)
    assert [bool(np.isfinite(h.weight).all()) for h in heads] == [True, False]
    assert (scores_of(heads[:1], features)[0].argmax(1) == labels).mean() > 0.9


def test_a_batch_larger_than_the_support_is_the_support() -> None:
    features, labels = problem(18)
    [a] = fit_linear(features, labels, 6, grid=[0.5], num_steps=20, batch=128, seed=2)
    [b] = fit_linear(features, labels, 6, grid=[0.5], num_steps=20, batch=18, seed=2)
    np.testing.assert_array_equal(a.weight, b.weight)


def test_scores_of_all_heads_are_each_heads_scores() -> None:
    features, labels = problem(60)
    heads = fit_linear(features, labels, 6, grid=[0.1, 0.2, 0.4], num_steps=5, batch=128, seed=0)
    np.testing.assert_allclose(scores_of(heads, features), [features @ h.weight + h.bias for h in heads], atol=1e-5)


def test_broken_features_and_settings_are_refused() -> None:
    features, labels = problem(12)
    right: dict[str, Any] = {"grid": [0.1], "num_steps": 5, "batch": 4, "seed": 0}
    for wrong in ({"grid": []}, {"grid": [0.1, 0.0]}, {"num_steps": 0}, {"batch": 0}):
        with pytest.raises(UserError, match="positive rates"):
            fit_linear(features, labels, 6, **(right | wrong))
    features[3, 3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fit_linear(features, labels, 6, **right)
