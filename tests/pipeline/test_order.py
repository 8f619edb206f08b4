"""Laws of the order of samples."""

import itertools

import numpy as np
import pytest

from pipeline.data.order import Order, permutation, rank_share
from pipeline.data.subset import Subset, select
from pipeline.errors import UserError

ORDER = Order((13, 7, 1, 29, 5, 11), seed=3, window_shards=2)


def flat(order: Order, start: int, count: int) -> list[tuple[int, int]]:
    return list(zip(*(a.tolist() for a in order.positions(start, count)), strict=True))


def test_an_epoch_is_a_permutation_of_all_samples() -> None:
    for epoch in range(5):
        _, samples = ORDER.positions(epoch * ORDER.num_samples, ORDER.num_samples)
        assert sorted(samples.tolist()) == list(range(ORDER.num_samples))


def test_starting_anywhere_gives_the_rest_of_the_same_sequence() -> None:
    whole = flat(ORDER, 0, 200)
    for start in range(0, 200, 7):
        assert flat(ORDER, start, 200 - start) == whole[start:]


def test_epochs_differ_and_seeds_differ() -> None:
    first, second = (ORDER.positions(e * ORDER.num_samples, ORDER.num_samples)[1] for e in (0, 1))
    other = Order(ORDER.shard_counts, seed=4, window_shards=2).positions(0, ORDER.num_samples)[1]
    assert (first != second).mean() > 0.8 and (first != other).mean() > 0.8


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_global_batch_holds_the_same_samples_for_any_number_of_ranks(num_ranks: int) -> None:
    positions = np.arange(64) * 3
    shares = [rank_share(positions, rank=r, num_ranks=num_ranks, micro_batch=4) for r in range(num_ranks)]
    assert sorted(np.concatenate(shares).ravel().tolist()) == positions.tolist()
    # Micro-batch by micro-batch, the ranks together walk the batch in its own order.
    assert np.stack(shares, axis=1).ravel().tolist() == positions.tolist()


def test_a_window_mixes_no_more_shards_than_it_says() -> None:
    order = Order((50,) * 10, seed=0, window_shards=2)
    _, samples = order.positions(0, 500)
    for window in samples.reshape(5, 100):
        assert len(set((window // 50).tolist())) == 2


def test_neighbours_of_one_epoch_are_not_neighbours_in_the_next() -> None:
    order = Order((100,) * 20, seed=0, window_shards=16)
    pairs = [
        set(zip(s.tolist(), s[1:].tolist(), strict=False))
        for s in (order.positions(e * 2000, 2000)[1] for e in range(10))
    ]
    repeated = sum(len(a & b) for a, b in itertools.pairwise(pairs))
    assert repeated < 9 * 10  # a full shuffle repeats about one pair an epoch


def test_the_permutation_is_the_one_that_was_recorded() -> None:
    """A changed order would change every resumed run: these numbers never change."""
    assert permutation(8, 1, 2, 3).tolist() == RECORDED


RECORDED = [1, 3, 7, 5, 2, 0, 4, 6]

LABELS = np.repeat(np.arange(4), [30, 20, 25, 40])


def test_supports_are_disjoint_from_the_held_out_part_for_every_seed() -> None:
    held_out = set(select(LABELS, Subset(per_class=0, holdout_per_class=5, part="holdout")).tolist())
    assert len(held_out) == 20
    for seed in range(10):
        support = select(LABELS, Subset(per_class=10, seed=seed, holdout_per_class=5))
        assert not held_out & set(support.tolist())
        assert np.bincount(LABELS[support]).tolist() == [10] * 4


def test_fewer_shots_are_contained_in_more() -> None:
    few, many = (set(select(LABELS, Subset(per_class=n, seed=2)).tolist()) for n in (3, 12))
    assert few < many


def test_too_few_images_name_the_class() -> None:
    with pytest.raises(UserError, match="class 1 has 20 images"):
        select(LABELS, Subset(per_class=18, holdout_per_class=5))
