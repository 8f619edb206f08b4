"""The same samples and the same pixels, whoever loads them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import eval_image, normalise, sample_rng, train_image
from pipeline.data.loading import batches
from pipeline.data.loading.datasets import Batch, DataConfig, EvalData, TrainData
from pipeline.data.sampling.subset import Subset
from pipeline.distributed import World
from pipeline.errors import UserError

AUGMENT = AugmentConfig(image_px=16, area_min=0.3, flip=True)


def world(rank: int, size: int) -> World:
    return World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))


def load(url: str, *, ranks: int, workers: int = 0, steps: range = range(4), micro: int = 8) -> list[list[Batch]]:
    data = TrainData(DataConfig(url=url, num_workers=workers, mix_blocks=4, block_mb=0.01), AUGMENT, seed=1)
    return [
        list(data.batches(steps=steps, global_batch=32, micro_batch=micro, world=world(r, ranks))) for r in range(ranks)
    ]


def sequence(per_rank: list[list[Batch]]) -> tuple[list[int], torch.Tensor]:
    """Sample numbers and pixels in the order of the global batches."""
    batches = [b for group in zip(*per_rank, strict=True) for b in group]
    return [int(s) for b in batches for s in b.samples], torch.cat([b.images for b in batches])


def test_a_loader_process_makes_its_batch_where_the_trainer_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not batches._fresh((2, 3)).is_shared()
    monkeypatch.setattr(batches, "get_worker_info", lambda: object())
    made = batches._fresh((2, 3, 4))
    assert made.is_shared() and made.shape == (2, 3, 4) and made.dtype == torch.uint8


def test_ranks_and_workers_change_neither_samples_nor_pixels(digits: str) -> None:
    keys, pixels = sequence(load(digits, ranks=1))
    for ranks, workers, micro in ((2, 0, 8), (4, 0, 8), (8, 0, 4), (1, 2, 8)):
        other_keys, other_pixels = sequence(load(digits, ranks=ranks, workers=workers, micro=micro))
        assert other_keys == keys and torch.equal(other_pixels, pixels)


def test_starting_in_the_middle_gives_the_rest(digits: str) -> None:
    keys, pixels = sequence(load(digits, ranks=2))
    rest, rest_pixels = sequence(load(digits, ranks=2, steps=range(2, 4)))
    assert rest == keys[64:] and torch.equal(rest_pixels, pixels[64:])


def test_labels_belong_to_their_images(digits: str) -> None:
    data = TrainData(DataConfig(url=digits), AUGMENT, seed=0)
    for batch in load(digits, ranks=1)[0]:
        assert batch.labels.tolist() == data.index.label[batch.samples.numpy()].tolist()


def test_the_same_sample_looks_different_in_another_epoch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    first, again, next_epoch = (train_image(pixels, AUGMENT, sample_rng(0, e, 5)) for e in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, next_epoch)


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_sees_each_sample_once_and_drops_nothing(ranks: int, digits: str) -> None:
    data = EvalData(DataConfig(url=digits), AUGMENT)
    seen = [int(s) for r in range(ranks) for b in data.batches(50, rank=r, num_ranks=ranks) for s in b.samples]
    assert sorted(seen) == list(range(697)) == list(range(data.num_samples))


def test_a_subset_trains_on_its_images_only(digits: str) -> None:
    config = DataConfig(url=digits, subset=Subset(per_class=3, seed=1))
    data = TrainData(config, AUGMENT, seed=0)
    batches = list(data.batches(steps=range(3), global_batch=30, micro_batch=30, world=world(0, 1)))
    assert data.num_samples == 30
    for batch in batches:  # each epoch of thirty is one batch here: each image once
        assert sorted(batch.samples.tolist()) == sorted(data.pools[0])
        assert torch.bincount(batch.labels).tolist() == [3] * 10


@pytest.mark.parametrize("crop", ["area", "pad", "none"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (8, 8), (16, 16), (90, 31)])
def test_any_image_size_gives_the_asked_square(crop: str, size: tuple[int, int]) -> None:
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    config = AugmentConfig(image_px=16, crop=crop)  # type: ignore[arg-type]
    assert train_image(pixels, config, sample_rng(0, 0, 0)).shape == (16, 16, 3)
    for resize in ("plain", "published", "aspect"):
        assert eval_image(pixels, AugmentConfig(image_px=16, eval_resize=resize)).shape == (16, 16, 3)  # type: ignore[arg-type]


def test_normalising_gives_zero_mean_and_unit_deviation_in_channels_last() -> None:
    images = torch.tensor([[[[0, 0, 0], [255, 255, 255]]]], dtype=torch.uint8)
    out = normalise(images, AugmentConfig(mean=(0.5,) * 3, std=(0.5,) * 3), torch.device("cpu"))
    assert out.shape == (1, 3, 1, 2) and out.flatten().tolist() == [-1, 1] * 3
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_cut_shard_stops_the_run_before_it_starts(digits: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    shard = next(copy.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-100_000])
    with pytest.raises(UserError, match=f"{shard.name} has .* bytes, its manifest says"):
        TrainData(DataConfig(url=str(copy)), AUGMENT, seed=0)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        TrainData(DataConfig(url=str(copy)), AUGMENT, seed=0)
