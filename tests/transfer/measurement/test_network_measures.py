"""Running averages taken anew, and what records say of a training."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nfnet.normalizers.registry import make_method
from nfnet.trunks.networks import create
from pipeline.errors import Diverged
from transfer.measurement.network_measures import accuracy, finite, of_training, reestimated


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


def test_measures_that_are_not_finite_are_left_out_whole() -> None:
    assert finite({"a": 1.0, "b": math.nan, "c": [1.0, math.inf], "d": [2.0]}) == {"a": 1.0, "d": [2.0]}


def test_a_training_that_ends_in_an_update_that_is_not_finite_has_diverged() -> None:
    """However short: of one to three updates the loop itself does not say so."""
    step: Any = SimpleNamespace(
        step=3, loss=1.0, gradient_norm=math.inf, accuracy=0.1, images_per_s=1.0, clipped_share=0.0, parts={}
    )
    with pytest.raises(Diverged, match="step 3, the last one that is recorded, is not finite"):
        of_training([step])
    step.gradient_norm = 2.0
    assert of_training([step])["train_loss"] == 1.0
