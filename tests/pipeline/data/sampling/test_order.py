"""Laws of the order of samples."""

import itertools
import pickle
import random
import time

import numpy as np
import pytest

from pipeline.data.sampling.mixture import PERIOD, Mixture, shares
from pipeline.data.sampling.order import Blocks, Order, cut_blocks, permutation, rank_share
from pipeline.data.sampling.subset import Subset, select
from pipeline.errors import UserError


def blocks(counts: list[int], in_block: int) -> Blocks:
    """Shards of so many samples of 1 byte each, cut into blocks of `in_block` (0: no blocks)."""
    shard = np.repeat(np.arange(len(counts)), counts)
    return cut_blocks(shard, np.concatenate([np.arange(n) for n in counts]), in_block)


COUNTS = [13, 7, 1, 29, 5, 11]
ORDER = Order(blocks(COUNTS, 4), seed=3, mix_blocks=3)


def flat(order: Order, start: int, count: int) -> list[tuple[int, int]]:
    return list(zip(*(a.tolist() for a in order.positions(start, count)), strict=True))


def test_an_epoch_is_a_permutation_of_all_samples() -> None:
    for epoch in range(5):
        _, samples = ORDER.positions(epoch * ORDER.num_samples, ORDER.num_samples)
        assert sorted(samples.tolist()) == list(range(ORDER.num_samples))


def by_the_formula(found: Blocks, seed: int, epoch: int, mix_blocks: int) -> list[int]:
    """The epoch that runs have had since there is an order, in plain integers: blocks take places by the words of stream 1, a
    sample is moved within the window by the upper half of its word of stream 2, in steps of 2^-20 block."""
    places, moves = (np.random.PCG64([seed, epoch, stream]).random_raw(found.num_samples).tolist() for stream in (1, 2))
    if mix_blocks == 0:
        return sorted(range(found.num_samples), key=lambda sample: moves[sample])
    ranked = sorted(range(len(found.first)), key=lambda block: places[block])
    keys = {}
    for place, block in enumerate(ranked):
        for sample in range(found.first[block], found.first[block] + found.count[block]):
            keys[sample] = place * 2**20 + ((moves[sample] >> 32) * mix_blocks >> 12)
    return sorted(keys, key=lambda sample: (keys[sample], sample))


@pytest.mark.parametrize("mix_blocks", [0, 1, 3, 20, 256])
@pytest.mark.parametrize("in_block", [0, 1, 4])
def test_the_order_is_that_of_the_runs_that_exist(mix_blocks: int, in_block: int) -> None:
    found = blocks([40 * count for count in COUNTS], in_block)
    order = Order(found, 5) if mix_blocks == 256 else Order(found, 5, mix_blocks)  # 256 is the default
    for epoch in (0, 3):
        samples = order.positions(epoch * order.num_samples, order.num_samples)[1]
        assert samples.tolist() == by_the_formula(found, 5, epoch, mix_blocks)


def test_a_block_has_2_to_the_20_places() -> None:
    keys = Order(ORDER.blocks, 5, 3)._keys(np.array([0, 2]), np.array([2**32 - 1, 2**31], np.uint32))
    assert keys.tolist() == [3 * 2**20 - 1, 2 * 2**20 + 3 * 2**19]


def test_starting_anywhere_gives_the_rest_of_the_same_sequence() -> None:
    whole = flat(ORDER, 0, 200)
    for start in range(0, 200, 7):
        assert flat(ORDER, start, 200 - start) == whole[start:]


def test_a_workers_copy_goes_on_alike_and_takes_nothing_computed_along() -> None:
    order = Order(ORDER.blocks, seed=3, mix_blocks=3)
    fresh = pickle.dumps(order)
    expected = flat(order, 40, 100)
    copy = pickle.dumps(order)
    assert len(copy) == len(fresh) and flat(pickle.loads(copy), 40, 100) == expected


def test_epochs_differ_and_seeds_differ() -> None:
    first, second = (ORDER.positions(e * ORDER.num_samples, ORDER.num_samples)[1] for e in (0, 1))
    other = Order(ORDER.blocks, seed=4, mix_blocks=3).positions(0, ORDER.num_samples)[1]
    assert (first != second).mean() > 0.8 and (first != other).mean() > 0.8


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_global_batch_holds_the_same_samples_for_any_number_of_ranks(num_ranks: int) -> None:
    positions = np.arange(64) * 3
    shares = [rank_share(positions, rank=r, num_ranks=num_ranks, micro_batch=4) for r in range(num_ranks)]
    assert sorted(np.concatenate(shares).ravel().tolist()) == positions.tolist()
    # Micro-batch by micro-batch, the ranks together walk the batch in its own order.
    assert np.stack(shares, axis=1).ravel().tolist() == positions.tolist()


def test_samples_come_from_a_sliding_window_of_blocks_and_one_enters_as_one_leaves() -> None:
    order = Order(blocks([60] * 100, 5), seed=0, mix_blocks=40)
    _, samples = order.positions(0, 6000)
    block = samples // 5
    firsts, lasts = np.full(1200, 6000), np.zeros(1200, int)
    np.minimum.at(firsts, block, np.arange(6000)), np.maximum.at(lasts, block, np.arange(6000))
    assert (lasts - firsts).max() <= 41 * 5 * 1.5  # spread over no more than the window, but for chance
    entered = np.sort(firsts)
    assert np.diff(entered[80:]).max() < 40  # never a window at once: eight blocks' worth at most between two entries


def test_neighbours_of_one_epoch_are_not_neighbours_in_the_next() -> None:
    order = Order(blocks([100] * 20, 10), seed=0, mix_blocks=0)
    pairs = [
        set(zip(s.tolist(), s[1:].tolist(), strict=False))
        for s in (order.positions(e * 2000, 2000)[1] for e in range(10))
    ]
    repeated = sum(len(a & b) for a, b in itertools.pairwise(pairs))
    assert repeated < 9 * 10  # a full shuffle repeats about one pair an epoch


def quality(order: Order, labels: np.ndarray, batch: int = 256) -> tuple[float, float]:
    """(mean entropy in bits of the classes of a batch, share of the full range that successive samples are apart).

    Of a full shuffle over N samples of C classes: nearly log2(C) for batches of many classes, and 1/3.
    """
    _, samples = order.positions(0, order.num_samples // batch * batch)
    entropies = []
    for group in labels[samples].reshape(-1, batch):
        share = np.bincount(group) / batch
        entropies.append(-(share[share > 0] * np.log2(share[share > 0])).sum())
    return float(np.mean(entropies)), float(np.abs(np.diff(samples)).mean() / order.num_samples)


def test_on_class_sorted_shards_the_block_shuffle_is_near_a_full_one() -> None:
    """1,000 classes one after another in 640 shards, blocks of 9 (ImageNet's images in 1 MB): the worst case there is."""
    labels = np.repeat(np.arange(1000), 128)
    counts = [200] * 640
    full = quality(Order(blocks(counts, 9), seed=0, mix_blocks=0), labels)
    ours = quality(Order(blocks(counts, 9), seed=0), labels)
    few_blocks = quality(Order(blocks(counts, 9), seed=0, mix_blocks=16), labels)
    assert full[0] > 7.7 and abs(full[1] - 1 / 3) < 0.01
    print(f"entropy {ours[0]:.2f} of {full[0]:.2f} bits, distance {ours[1]:.4f} of {full[1]:.4f}")
    assert ours[0] > 0.9 * full[0] and abs(ours[1] - full[1]) < 0.01
    assert few_blocks[0] < 0.7 * full[0]  # the measure tells a bad shuffle from a good one


def test_with_all_blocks_mixed_every_sample_is_as_likely_to_come_first() -> None:
    _, samples = Order(blocks([40] * 10, 5), seed=5, mix_blocks=0).positions(0, 400)
    firsts = [int(Order(blocks([40] * 10, 5), seed=s, mix_blocks=0).positions(0, 1)[1][0]) for s in range(400)]
    assert sorted(samples.tolist()) == list(range(400))
    assert np.histogram(firsts, bins=4, range=(0, 400))[0].min() > 70  # 100 each, deviation 9


def test_killed_a_hundred_times_the_sequence_is_the_unbroken_one() -> None:
    chance = random.Random(0)
    whole = flat(ORDER, 0, 10_000)
    seen: list[tuple[int, int]] = []
    for _ in range(100):  # each life begins with nothing but the number of samples that were consumed
        order = Order(blocks(COUNTS, 4), seed=3, mix_blocks=3)
        seen += flat(order, len(seen), chance.randrange(1, 100))
    assert seen == whole[: len(seen)] and len(seen) > 4000


def test_any_position_of_ten_million_samples_is_reached_without_walking_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sampling.order.KEPT_CHUNKS", 1 << 30)
    shard = np.repeat(np.arange(17_000), 589)
    order = Order(cut_blocks(shard, np.arange(len(shard)) % 589 * 110_000, 1_000_000), seed=0)
    begin = time.process_time()
    for position in (9_999_999, 55_555_555):
        order.positions(position, 4096)
    used_s = time.process_time() - begin
    print(f"{used_s:.2f} s for two positions in different epochs")
    ordered = sum(len(chunk) for chunk in order._chunks.values())
    assert order.num_samples > 10_000_000 and 2 * 4096 <= ordered < 50_000  # only what lies there was put in order


def test_a_mixture_holds_its_weights_and_each_source_its_own_epochs() -> None:
    orders = [Order(blocks([n], 4), seed=i) for i, n in enumerate((500, 900, 100))]
    mixture = Mixture(orders, (0.5, 0.3, 0.2))
    sources, epochs, samples = mixture.positions(0, 30_000)
    for start in range(0, 20_000, 777):
        share = np.bincount(sources[start : start + 10_000]) / 10_000
        assert np.abs(share / [0.5, 0.3, 0.2] - 1).max() < 0.01
    for source, order in enumerate(orders):
        mine = sources == source
        expected = order.positions(0, int(mine.sum()))
        assert np.array_equal(epochs[mine], expected[0]) and np.array_equal(samples[mine], expected[1])
    for position in (0, 1, 17, PERIOD, 2 * PERIOD + 3):
        tail = mixture.positions(position, 100)
        assert all(
            np.array_equal(a, b[position : position + 100])
            for a, b in zip(tail, (sources, epochs, samples), strict=True)
        )
        assert [mixture.consumed(s, position) for s in range(3)] == np.bincount(
            sources[:position], minlength=3
        ).tolist()


def test_shares_are_the_largest_remainders_of_a_period() -> None:
    assert shares((1, 1, 1)).tolist() == [334, 333, 333] and shares((2, 6)).tolist() == [250, 750]
    assert shares((1, 1, 4)).tolist() == [167, 167, 666] and shares((5,)).tolist() == [PERIOD]


def test_a_mixture_takes_one_weight_above_zero_for_each_source_and_none_too_small_to_see() -> None:
    for weights in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(UserError, match="give each one above 0"):
            Mixture([ORDER, ORDER], weights)
    with pytest.raises(UserError, match=r"a source has less than 0\.1%"):
        Mixture([ORDER, ORDER], (1.0, 1e-4))
    both = Mixture([ORDER, ORDER], (1.0, 1.0))
    assert both.num_samples == 2 * sum(COUNTS) and both.positions(0, 6)[0].tolist() == [0, 1] * 3
    assert Mixture([ORDER, ORDER], (3.0, 1.0)).positions(0, 8)[0].tolist() == [0, 0, 1, 0] * 2
    assert [both.consumed(source, 2 * PERIOD + 7) for source in (0, 1)] == [PERIOD + 4, PERIOD + 3]
    alone = Mixture([ORDER])
    assert alone.consumed(0, 1234) == 1234 and not alone.positions(5, 9)[0].any()
    assert all(np.array_equal(a, b) for a, b in zip(alone.positions(5, 9)[1:], ORDER.positions(5, 9), strict=True))


def test_the_permutation_is_the_one_that_was_recorded() -> None:
    """A changed order would change every resumed run: these numbers never change."""
    assert permutation(8, 1, 2, 3).tolist() == RECORDED


RECORDED = [1, 3, 7, 5, 2, 0, 4, 6]

SUPPORT, HELD_OUT = [19, 26, 34, 47], [23, 25, 44, 49]

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
    assert len(select(LABELS, Subset(per_class=15, holdout_per_class=5))) == 60  # exactly as many as there are
    assert len(select(LABELS, Subset(per_class=1, holdout_per_class=19))) == 4
    with pytest.raises(UserError, match="class 1 has 20 images"):
        select(LABELS, Subset(per_class=0, holdout_per_class=20))  # nothing would be left to train on
    assert len(select(LABELS, Subset(per_class=0, holdout_per_class=20, part="holdout"))) == 80


def test_a_share_is_held_out_of_each_class_and_the_support_is_all_the_rest() -> None:
    held, rest = (select(LABELS, Subset(per_class=0, holdout_share=0.1, part=p)) for p in ("holdout", "support"))
    assert np.bincount(LABELS[held]).tolist() == [3, 2, 2, 4]
    assert np.array_equal(np.sort(np.concatenate([held, rest])), np.arange(len(LABELS)))
    least = select(LABELS, Subset(per_class=0, holdout_share=0.001, holdout_per_class=9, part="holdout"))
    assert np.bincount(LABELS[least]).tolist() == [1] * 4 and np.array_equal(least, np.sort(least))


def test_the_images_drawn_are_those_that_were_recorded() -> None:
    """Published numbers rest on them: they never change."""
    assert select(LABELS[:50], Subset(per_class=2, seed=1)).tolist() == SUPPORT
    assert select(LABELS[:50], Subset(per_class=0, holdout_per_class=2, part="holdout")).tolist() == HELD_OUT


def test_a_list_is_taken_as_it_is_and_must_fit() -> None:
    assert select(LABELS, Subset(per_class=0, listed=(114, 0, 7))).tolist() == [0, 7, 114]
    assert select(LABELS, Subset(per_class=0, listed=(5,))).tolist() == [5]
    for listed in ((0, 3, 115), (3, 3)):
        with pytest.raises(UserError, match="does not fit a split of 115"):
            select(LABELS, Subset(per_class=0, listed=listed))


def test_a_subset_has_its_ranges_and_holds_out_nothing_unless_asked() -> None:
    assert len(select(LABELS, Subset(per_class=0))) == len(LABELS)
    assert np.array_equal(select(LABELS, Subset(per_class=3)), select(LABELS, Subset(per_class=3, seed=0)))
    with pytest.raises(UserError, match=r"^subset\.per_class is -1"):
        Subset(per_class=-1)
