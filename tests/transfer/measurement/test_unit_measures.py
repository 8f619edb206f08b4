"""Units and smoothness, against networks whose numbers are known."""

from dataclasses import fields

import pytest
import torch
from torch import nn

from nfnet.analysis.flops import multiply_adds
from nfnet.normalizers.registry import get_method, list_methods
from nfnet.trunks.networks import create
from transfer.measurement.unit_measures import mean_correlation, smoothness, units


def test_a_channel_behind_a_relu_that_is_never_positive_is_dead() -> None:
    first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    nn.init.zeros_(first.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        first.bias[1] = -100  # type: ignore[index]
    found = units(nn.Sequential(first, nn.ReLU(), second), torch.randn(8, 3, 5, 5))
    assert found["dead_share"] == [0.25]


def test_correlation_of_two_units_is_numpys() -> None:
    rows = torch.randn(2, 500)
    rows[1] -= 0.7 * rows[0]
    assert mean_correlation(rows) == pytest.approx(abs(torch.corrcoef(rows)[0, 1].item()), rel=1e-4)
    assert mean_correlation(rows[:1]) == 0


def test_beta_of_logistic_regression_with_small_steps_is_the_curvature_along_the_gradient() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3, bias=False)).double()
    images, labels = torch.randn(32, 6, 1, 1, dtype=torch.float64), torch.randint(3, (32,))
    weight = network[1].weight.detach().clone()

    def loss(w: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(images.flatten(1) @ w.view(3, 6).T, labels)

    gradient = torch.autograd.functional.jacobian(loss, weight.view(-1))
    hessian = torch.autograd.functional.hessian(loss, weight.view(-1))
    expected = ((hessian @ gradient).norm() / gradient.norm()).item()  # type: ignore[operator]
    found = smoothness(network, images, labels, rate=1e-3)
    assert found["effective_beta"] == pytest.approx(expected, rel=1e-2)
    assert found["weights_size"] == pytest.approx(weight.norm().item())
    assert torch.equal(network[1].weight, weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list_methods())
def test_a_network_of_every_method_is_measured_and_stays_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    groups = {"stat_group": 4} if "stat_group" in {f.name for f in fields(get_method(name))} else {}
    network = create("resnet_v2_tiny", 4, method=name, **groups).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    found = {**units(network, images), **smoothness(network, images, labels, 0.01)}
    assert len(found["dead_share"]) == len(found["unit_correlation"]) > 5  # type: ignore[arg-type]
    assert all(0 <= c <= 1 for c in found["unit_correlation"])  # type: ignore[union-attr]
    assert found["effective_beta"] > 0  # type: ignore[operator]
    assert multiply_adds(network, 16) > 1e5
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
