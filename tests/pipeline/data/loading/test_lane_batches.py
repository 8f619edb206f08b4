"""Batches in lanes: the laws of ranks, workers, resume, micro-batches, repeats, skipped steps, the ledger and small sets."""

import dataclasses

import numpy as np
import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.data.loading.sample_ledger import Ledger
from pipeline.data.sampling.subset import Subset
from pipeline.distributed import World
from pipeline.errors import UserError

BATCH, MICRO = 32, 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sampling.lanes.MIN_TURNS", 10)


def config(url: str, *, lanes: int = 8, **changes: object) -> DataConfig:
    return DataConfig(url=url, order="lanes", lanes=lanes, lane_blocks=1, block_mb=0.0025, **changes)  # type: ignore[arg-type]


def train_data(found: DataConfig) -> TrainData:
    return TrainData(found, AugmentConfig(image_px=8), seed=3, global_batch=BATCH)


def micro_batches(data: TrainData, step: int, num_ranks: int) -> dict[int, tuple[list[int], list[int]]]:
    """By its number in the step: samples and views of each micro-batch of all ranks."""
    found = {}
    for rank in range(num_ranks):
        world = World(rank=rank, size=num_ranks, local_rank=0, device=torch.device("cpu"))
        share = data.draw_share(step, BATCH, rank=rank, num_ranks=num_ranks, micro_batch=MICRO)
        accumulation = len(share[0])
        for micro in range(accumulation):
            number = data.micro_batch_number(micro, world, accumulation)
            found[number] = (share[1][micro].tolist(), share[2][micro].tolist())
    return found


@pytest.mark.parametrize("repeats", [1, 2])
def test_micro_batches_are_the_same_for_any_number_of_ranks(digits: str, repeats: int) -> None:
    data = train_data(config(digits, repeats=repeats, lanes=8))
    for step in (0, 5, 21, 40):
        alone = micro_batches(data, step, 1)
        assert sorted(alone) == list(range(BATCH // MICRO))
        assert all(micro_batches(data, step, ranks) == alone for ranks in (2, 4, 8))
        drawn = data.draw(step, BATCH)
        assert sorted(s for samples, _ in alone.values() for s in samples) == sorted(drawn[1].tolist())
        for samples, _ in alone.values():
            assert len(set(samples)) == MICRO  # copies lie in different micro-batches


def test_loader_processes_and_a_start_in_the_middle_change_neither_samples_nor_pixels(digits: str) -> None:
    world = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))

    def batches(first: int, num_workers: int) -> list[tuple[list[int], torch.Tensor]]:
        data = train_data(config(digits, num_workers=num_workers))
        found = data.batches(steps=range(first, 6), global_batch=BATCH, micro_batch=MICRO, world=world)
        return [(batch.samples.tolist(), batch.images.clone()) for batch in found]

    expected, found = batches(0, 0)[3 * BATCH // 2 // MICRO :], batches(3, 2)
    assert [samples for samples, _ in found] == [samples for samples, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_the_ledger_counts_what_was_drawn(digits: str) -> None:
    data = train_data(config(digits, skip_steps=("2:5",)))
    num_steps, num = 40, data.num_samples
    pages = Ledger(data, global_batch=BATCH).pages(num_steps)
    assert len(pages) == 2 and all(p.used + p.skipped + p.dropped + p.excluded == p.manifest == num for p in pages)
    assert [page.skipped for page in pages] == [3 * BATCH, 0]
    drawn = [data.draw(step, BATCH)[1].tolist() for step in range(num_steps)]
    assert sum(page.used for page in pages) == len(drawn) * BATCH
    assert len({s for step in drawn[: num // BATCH - 3] for s in step}) == (num // BATCH - 3) * BATCH


def test_skipped_steps_leave_the_others_as_they_are(digits: str) -> None:
    plain, skipping = train_data(config(digits)), train_data(config(digits, skip_steps=("2:5",)))
    assert micro_batches(skipping, 2, 2) == micro_batches(plain, 5, 2)


def test_a_small_set_and_a_subset_are_shuffled_whole(digits: str) -> None:
    for found in (
        DataConfig(url=digits, order="lanes"),
        DataConfig(url=digits, order="lanes", subset=Subset(per_class=10)),
    ):
        data = train_data(found)
        assert data.layouts == [None] and not data.mixture.has_lanes
        drawn = np.concatenate([data.draw(step, 20)[1] for step in range(5)])
        assert len(set(drawn.tolist())) == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 7}, "does not divide the 32"),
        ({"subset": Subset(per_class=10)}, "leave out data.lanes"),
        ({"repeats": 3}, "whole samples"),
    ],
)
def test_what_does_not_fit_lanes_is_refused(digits: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_data(dataclasses.replace(config(digits), **changes))  # type: ignore[arg-type]
