"""Mixing: the same images at any number of ranks, and the loss of mixed labels against timm's."""

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy

from nfnet.optim.losses import MixedLabels, label_smoothing_cross_entropy
from pipeline.data.augment.augment_config import AugmentConfig, nfnet_augment
from pipeline.data.augment.counter_rng import Draws
from pipeline.data.augment.mixup_cutmix import mix
from pipeline.data.loading.datasets import Batch, DataConfig, TrainData
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.recipes import get
from pipeline.training.run import override

CROPS = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 3), np.uint8)


def mixed(mixup: float, cutmix: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    images = CROPS.copy()
    draws = [Draws(seed, i) for i in range(len(images))]
    return images, *mix(images, draws, mixup_alpha=mixup, cutmix_alpha=cutmix)


def test_mixup_is_timms_for_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    images, partners, weights = mixed(0.8, 0)
    assert partners.tolist() == [1, 0, 3, 2, 5, 4, 7, 6] and weights.min() > 0 and len(set(weights)) > 4
    labels = torch.arange(8)
    for i in range(0, 8, 2):  # timm pairs a batch's first with its last
        monkeypatch.setattr(Mixup, "_params_per_elem", lambda self, n, i=i: (weights[i : i + 2], np.zeros(2, bool)))
        theirs, targets = Mixup(mixup_alpha=0.8, mode="elem", label_smoothing=0.1, num_classes=8)(
            torch.from_numpy(CROPS[i : i + 2]).permute(0, 3, 1, 2).float(), labels[i : i + 2]
        )
        assert np.abs(theirs.permute(0, 2, 3, 1).numpy() - images[i : i + 2]).max() <= 0.5001
        assert torch.allclose(targets.sum(1), torch.ones(2))


def test_cutmix_weighs_by_the_pixels_that_are_left() -> None:
    seen = set()
    for seed in range(20):
        images, partners, weights = mixed(0, 1.0, seed)
        for i, (partner, weight) in enumerate(zip(partners, weights, strict=True)):
            own = (images[i] == CROPS[i]).all(axis=2)
            assert (images[i][~own] == CROPS[partner][~own]).all()
            assert own.mean() == pytest.approx(weight, abs=1e-6)
            rows, columns = np.nonzero(~own)
            if len(rows):
                assert len(rows) == np.ptp(rows) * np.ptp(columns) + np.ptp(rows) + np.ptp(columns) + 1  # a rectangle
            seen.add(round(float(weight), 2))
    assert len(seen) > 30 and min(seen) < 0.4


def test_one_half_is_mixed_up_and_the_other_cut() -> None:
    images, partners, _ = mixed(0.8, 1.0)
    for i in range(8):
        is_own_or_partners = ((images[i] == CROPS[i]) | (images[i] == CROPS[partners[i]])).all()
        assert is_own_or_partners == (i % 4 > 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_two_labels_is_timms_of_soft_targets(smoothing: float) -> None:
    logits, labels = torch.randn(6, 10), torch.tensor([0, 3, 9, 3, 1, 1])
    weight = torch.tensor([1.0, 0.25, 0.5, 0.0, 0.7, 0.3])
    targets = mixup_target(labels, 10, weight[:, None], smoothing)
    ours = MixedLabels(labels, labels.flip(0), weight)
    torch.testing.assert_close(
        label_smoothing_cross_entropy(logits, ours, smoothing), SoftTargetCrossEntropy()(logits, targets)
    )
    parts = label_smoothing_cross_entropy(logits, ours, smoothing, reduction="none")
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, ours, smoothing, reduction="sum"), parts.sum())
    assert ours.larger.tolist() == [0, 1, 9, 9, 1, 0]


def test_a_weight_of_one_is_the_plain_loss() -> None:
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    ones = MixedLabels(labels, labels.flip(0), torch.ones(4))
    plain = label_smoothing_cross_entropy(logits, labels, 0.1)
    torch.testing.assert_close(label_smoothing_cross_entropy(logits, ones, 0.1), plain)


def global_batches(url: str, augment: AugmentConfig, *, ranks: int, micro: int, workers: int = 0) -> list[torch.Tensor]:
    data = TrainData(DataConfig(url=url, num_workers=workers), augment, seed=1)
    per_rank: list[list[Batch]] = [
        list(
            data.batches(
                steps=range(2),
                global_batch=32,
                micro_batch=micro,
                world=World(rank=r, size=ranks, local_rank=r, device=torch.device("cpu")),
            )
        )
        for r in range(ranks)
    ]
    batches = [b for group in zip(*per_rank, strict=True) for b in group]
    fields = ("images", "samples", "labels", "other_labels", "weights")
    return [torch.cat([getattr(b, f) for b in batches]) for f in fields]


@pytest.mark.parametrize("order", ["before_policy", "after_policy"])
@pytest.mark.parametrize("policy", ["nfnet", "classic", "three"])
def test_ranks_micro_batches_and_workers_change_no_mixed_pixel(digits: str, order: str, policy: str) -> None:
    augment = nfnet_augment(2, image_px=24)
    augment = AugmentConfig(**{**augment.__dict__, "policy": policy, "mix_order": order, "mixup_alpha": 0.9})
    whole = global_batches(digits, augment, ranks=1, micro=32)
    assert (whole[4] < 1).float().mean() > 0.8
    data = TrainData(DataConfig(url=digits), augment, seed=1)
    assert whole[2].tolist() == data.index.label[whole[1].numpy()].tolist()
    assert whole[3].tolist() == whole[2].view(-1, 2).flip(1).flatten().tolist()
    for ranks, micro in ((1, 4), (2, 8), (4, 8), (8, 4)):
        for ours, theirs in zip(global_batches(digits, augment, ranks=ranks, micro=micro), whole, strict=True):
            assert torch.equal(ours, theirs)


def test_loader_processes_change_no_mixed_pixel(digits: str) -> None:
    augment = nfnet_augment(1, image_px=16)
    here, there = (global_batches(digits, augment, ranks=1, micro=16, workers=w) for w in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_a_micro_batch_that_would_cut_a_pair_is_refused(digits: str) -> None:
    with pytest.raises(UserError, match=r"micro_batch is 6, .* multiple of 4"):
        global_batches(digits, nfnet_augment(1, image_px=16), ranks=1, micro=6)
    AugmentConfig(mixup_alpha=0.2).check_micro_batch(6)
    AugmentConfig().check_micro_batch(7)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mixup_alpha", 2), ("policy_magnitude", -1), ("area_min", 1.5), ("aspect_max", 0.5), ("policy", "trivial")],
)
def test_a_wrong_setting_is_refused_in_one_sentence(field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"augment.{field} is"):
        override(get("nfnet_f0_imagenet"), {f"augment.{field}": value})


def test_the_imagenet_recipes_have_the_papers_augmentation() -> None:
    for depth, magnitude in enumerate((5, 10, 10, 15, 15, 15, 15)):
        run = get(f"nfnet_f{depth}_imagenet")
        augment = run.augment
        assert (augment.policy, augment.policy_layers, augment.policy_magnitude) == ("nfnet", 4, magnitude)
        assert (augment.mixup_alpha, augment.cutmix_alpha, augment.mix_order) == (0.2, 1.0, "before_policy")
        augment.check_micro_batch(run.micro_batch)
        assert augment.crop_and_flip().policy == "none" and not augment.crop_and_flip().mixes


def test_a_policy_that_moves_images_out_of_sight_is_refused() -> None:
    with pytest.raises(UserError, match=r"moves images by 150 px, and augment\.image_px is 128"):
        nfnet_augment(15, image_px=128)
    assert nfnet_augment(15, image_px=320).policy_magnitude == 15
