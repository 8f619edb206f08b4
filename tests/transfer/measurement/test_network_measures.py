"""Running averages taken anew, and what records say of a training."""

import torch
from torch import nn

from nfnet.normalizers.registry import make_method
from nfnet.trunks.networks import create
from transfer.measurement.network_measures import accuracy, of_training, reestimated


def test_averages_taken_anew_are_the_mean_over_the_batches() -> None:
    torch.manual_seed(0)
    norm = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(8, 3, 4, 4) + i for i in range(4)]
    again = reestimated(norm, batches)
    assert again is not None
    torch.testing.assert_close(again[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))  # type: ignore[index]
    assert not again.training
    torch.testing.assert_close(norm[0].running_mean, torch.zeros(3))


def test_a_network_without_averages_has_none_to_take() -> None:
    assert reestimated(create("resnet_v2_tiny", 4, method=make_method("none")), [torch.randn(2, 3, 16, 16)]) is None


def test_accuracy_counts_images() -> None:
    logits = nn.Identity()
    images = [(torch.eye(4), torch.tensor([0, 1, 2, 0])), (torch.eye(4)[:2], torch.tensor([0, 0]))]
    assert accuracy(logits, images) == 4 / 6
    assert of_training([]) == {}
