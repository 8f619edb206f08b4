"""Units and smoothness, against networks whose numbers are known."""

import math
from dataclasses import fields

import pytest
import torch
from torch import nn

from nfnet.analysis.flops import multiply_adds
from nfnet.normalizers.registry import get_method, list_methods
from nfnet.trunks.networks import create
from transfer.measurement.batch_norm_ratios import batch_norm_ratios
from transfer.measurement.unit_measures import mean_correlation, mean_information, smoothness, units


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


def test_information_of_two_normal_units_is_that_of_their_binned_distribution() -> None:
    """Cell by cell from scipy's bivariate normal; the whole information is -log(1 - rho^2) / 2, which binning cannot exceed."""
    from scipy.stats import multivariate_normal, norm

    rho = 0.9
    edges = [-9.0, *norm.ppf([i / 8 for i in range(1, 8)]), 9.0]
    both = multivariate_normal([0, 0], [[1, rho], [rho, 1]])
    share = [
        [both.cdf([edges[i + 1], edges[j + 1]], lower_limit=[edges[i], edges[j]]) for j in range(8)] for i in range(8)
    ]
    expected = sum(p * math.log(64 * p) for row in share for p in row if p > 1e-12)
    assert 0.6 < expected < -0.5 * math.log(1 - rho**2)
    torch.manual_seed(0)
    first, other = torch.randn(2, 4000)
    rows = torch.stack([first, rho * first + (1 - rho**2) ** 0.5 * other])
    assert mean_information(rows) == pytest.approx(expected, abs=0.03)
    assert mean_information(rows[:1]) == 0
    assert mean_information(rows[[0, 0]]) == pytest.approx(math.log(8), abs=0.01)


def test_units_that_know_nothing_of_each_other_have_no_information_even_with_few_observations() -> None:
    torch.manual_seed(0)
    assert mean_information(torch.randn(48, 500)) == pytest.approx(0, abs=0.003)  # without the correction 49 / 1000


def test_batch_normalisation_beside_itself_costs_the_same_and_a_network_without_it_keeps_less() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    found = {}
    for name in ("batch_norm", "none"):
        options = {"method": name, "widths": (8, 8, 8)}
        network = create("resnet_v2_tiny", 4, **options)
        before = {k: v.clone() for k, v in network.state_dict().items()}
        found[name] = batch_norm_ratios(network, "trunk:resnet_v2_tiny", options, images, labels)
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
        assert found[name]["speed_ratio"] > 0
    assert found["batch_norm"]["memory_ratio"] == 1
    assert found["none"]["memory_ratio"] < 0.8
    assert batch_norm_ratios(network, "nfnet_tiny", {}, images, labels) == {}


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
