"""Laws of the order in lanes; those that it shares with the windowed order are stated on it anew."""

import itertools
import pickle

import numpy as np
import pytest

from pipeline.data.sampling.bijection import Bijection
from pipeline.data.sampling.lanes import MIN_TURNS, LaneLayout, LaneOrder, choose_layout, lane_layout
from pipeline.data.sampling.mixture import Mixture
from pipeline.data.sampling.order import Order, cut_blocks
from pipeline.errors import UserError

STORED_PERMUTATION = [611, 516, 995, 433, 436, 596, 230, 225]
STORED_LARGE = [2142585711, 3846708237, 3888982625]
STORED_POSITIONS = [3698, 5003, 1087, 1957, 1522, 8919, 6743, 2724, 2937, 5911]


def layout_of(num: int, block: int, lanes: int, window: int) -> LaneLayout:
    found = lane_layout(num, block_samples=block, lanes=lanes, window=window, min_turns=4)
    assert found is not None
    return found


SIZES = [(10_007, 16, 8, 5), (4_096, 8, 4, 8), (5_003, 7, 4, 9), (999, 1, 2, 3)]


def random_sizes(num: int) -> list[tuple[int, int, int, int]]:
    """(samples, block, lanes, window) that fit each other."""
    rng = np.random.default_rng(0)
    found = []
    while len(found) < num:
        size = int(rng.integers(50, 6000)), int(rng.integers(1, 30)), int(rng.integers(1, 17)), int(rng.integers(1, 12))
        if lane_layout(size[0], block_samples=size[1], lanes=size[2], window=size[3], min_turns=4) is not None:
            found.append(size)
    return found


@pytest.mark.parametrize("num", [1, 2, 3, 10, 97, 1000, 4097])
def test_the_bijection_is_one(num: int) -> None:
    law, numbers = Bijection(num, 3, 1), np.arange(num)
    assert sorted(law(numbers).tolist()) == numbers.tolist()


def test_the_bijection_is_part_of_the_format_of_a_run() -> None:
    assert Bijection(1000, 7, 2, 3)(np.arange(8)).tolist() == STORED_PERMUTATION
    assert Bijection(4_000_000_000, 7, 2, 3)(np.array([0, 1, 3_999_999_999])).tolist() == STORED_LARGE
    assert LaneOrder(layout_of(10_007, 16, 8, 5), 7).positions(10_000, 10)[1].tolist() == STORED_POSITIONS


@pytest.mark.parametrize("size", SIZES)
def test_each_sample_comes_once_an_epoch_and_epochs_differ(size: tuple[int, int, int, int]) -> None:
    order = LaneOrder(layout_of(*size), 5)
    epochs, samples = order.positions(0, 2 * size[0])
    assert epochs.tolist() == [0] * size[0] + [1] * size[0]
    first, second = samples[: size[0]], samples[size[0] :]
    assert np.array_equal(np.sort(first), np.arange(size[0])) and np.array_equal(np.sort(second), np.arange(size[0]))
    assert (first != second).mean() > 0.8


def test_each_sample_comes_once_for_any_sizes() -> None:
    for size in random_sizes(100):
        samples = LaneOrder(layout_of(*size), 1).positions(0, size[0])[1]
        assert len(np.unique(samples)) == size[0], size


def test_any_position_is_the_one_of_the_whole_sequence() -> None:
    layout = layout_of(*SIZES[0])
    whole = LaneOrder(layout, 5).positions(0, 21_000)[1]
    for start in (0, 1, 5_000, 10_000, 10_006, 20_013):
        assert LaneOrder(layout, 5).positions(start, 20)[1].tolist() == whole[start : start + 20].tolist()
    scattered = np.random.default_rng(1).integers(0, 21_000, 300)
    assert LaneOrder(layout, 5).at(scattered)[1].tolist() == whole[scattered].tolist()


def test_a_workers_copy_goes_on_alike_and_takes_nothing_computed_along() -> None:
    order = LaneOrder(layout_of(*SIZES[0]), 5)
    fresh = pickle.dumps(order)
    expected = order.positions(640, 640)[1]
    copy = pickle.dumps(order)
    assert len(copy) == len(fresh) and pickle.loads(copy).positions(640, 640)[1].tolist() == expected.tolist()


def test_a_lane_has_only_its_window_of_blocks_open() -> None:
    layout = layout_of(*SIZES[0])
    order = LaneOrder(layout, 5)
    lane = np.arange(2, layout.num_in_blocks, layout.lanes)
    blocks = layout.block_of(order.at(lane)[1]).reshape(-1, layout.block_samples)  # a row a tick
    for now, later in itertools.pairwise(blocks):
        assert len(set(now.tolist())) == layout.window
        assert len(set(later.tolist()) - set(now.tolist())) == 1  # one opens as one closes


def test_lanes_share_no_block() -> None:
    layout = layout_of(*SIZES[0])
    order = LaneOrder(layout, 5)
    positions = np.arange(layout.num_in_blocks)
    blocks = layout.block_of(order.at(positions)[1])
    owners = {(int(b), int(p)) for b, p in zip(blocks, positions % layout.lanes, strict=True)}
    assert len(owners) == len(np.unique(blocks)) == layout.num_blocks


@pytest.mark.parametrize("size", SIZES)
def test_a_block_is_neighbours_and_few_samples_are_in_none(size: tuple[int, int, int, int]) -> None:
    layout = layout_of(*size)
    blocks = layout.block_of(np.arange(size[0]))
    assert (blocks < 0).sum() == size[0] - layout.num_in_blocks < layout.lanes * layout.block_samples
    for block in (0, 1, layout.num_blocks // 2, layout.num_blocks - 1):
        rows = np.flatnonzero(blocks == block)
        assert (rows[0], rows[-1] + 1) == layout.span(block) and len(rows) == layout.block_samples


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_have_lanes_of_their_own_and_together_the_batch(num_ranks: int) -> None:
    layout = layout_of(10_007, 16, 8, 5)
    mixture = Mixture([LaneOrder(layout, 5)])
    seen: list[set[int]] = [set() for _ in range(num_ranks)]
    for step in range(40):
        whole = mixture.by_lane(step * 64, 64, slice(None))[2].tolist()
        assert sorted(whole) == sorted(mixture.positions(step * 64, 64)[2].tolist())
        for rank in range(num_ranks):
            part = slice(rank * 64 // num_ranks, (rank + 1) * 64 // num_ranks)
            share = mixture.by_lane(step * 64, 64, part)[2]
            assert share.tolist() == whole[part]
            seen[rank] |= set(layout.block_of(share).tolist())
    assert sum(map(len, seen)) == len(set().union(*seen))  # no block has two ranks


def test_a_mixture_keeps_its_shares_and_each_source_its_order() -> None:
    lanes = LaneOrder(layout_of(10_007, 16, 8, 5), 5)
    small = Order(cut_blocks(np.zeros(40, int), np.arange(40), 0), seed=1, mix_blocks=0)
    mixture = Mixture([lanes, small], [0.75, 0.25])
    for start in (0, 6400):
        by_lane = set(zip(*(a.tolist() for a in mixture.by_lane(start, 64, slice(None))), strict=True))
        assert by_lane == set(zip(*(a.tolist() for a in mixture.positions(start, 64)), strict=True))


def excess(order: LaneOrder, labels: np.ndarray, batch: int) -> float:
    """Variance of class counts in a batch over that of a random draw without replacement."""
    num, classes = order.num_samples, int(labels.max()) + 1
    batches = labels[order.positions(0, num // batch * batch)[1]].reshape(-1, batch)
    counts = np.stack([np.bincount(b, minlength=classes) for b in batches])
    share = np.bincount(labels, minlength=classes) / num
    return float(((counts - batch * share) ** 2).sum(1).mean() / (batch * (share * (1 - share)).sum()))


def test_shuffled_shards_mix_as_a_full_shuffle_and_sorted_ones_within_the_bound() -> None:
    num, batch, lanes, window = 65_536, 256, 16, 8
    order = LaneOrder(layout_of(num, 16, lanes, window), 3)
    by_class = np.sort(np.arange(num) % 64)
    assert excess(order, np.random.default_rng(0).permutation(by_class), batch) < 1.1
    assert 1.1 < excess(order, by_class, batch) < 1 + batch / (lanes * window) + 0.1


def test_four_billion_samples_cost_what_a_thousand_cost() -> None:
    layout = choose_layout(4_000_000_000, block_samples=60, lanes=1024, window=16, batch=4096)
    assert layout is not None and layout.reread_share < 0.001
    order = LaneOrder(layout, 1)
    samples = order.positions(2_000_000_000, 64)[1]
    assert len(np.unique(samples)) == 64 and samples.max() < 4_000_000_000
    assert len(layout.singles) < 1 << 20


def test_the_number_of_lanes_follows_from_dataset_and_batch() -> None:
    def lanes(num: int, batch: int) -> int:
        found = choose_layout(num, block_samples=40, lanes=0, window=16, batch=batch)
        return found.lanes if found else 0

    assert lanes(300_000_000, 4096) == 512
    assert lanes(300_000_000, 4096 * 3) == 512
    assert lanes(300_000_000, 100) == 100
    assert lanes(40 * 16 * MIN_TURNS * 4, 4096) == 4
    assert lanes(20_000, 4096) == 0


@pytest.mark.parametrize(
    ("num", "lanes", "batch", "message"),
    [
        (10**8, 96, 4096, "does not divide the 4096.*as 64"),
        (10**6, 64, 4096, "set it to at most 31"),
        (1000, 4, 64, "windowed"),
    ],
)
def test_lanes_that_do_not_fit_are_refused(num: int, lanes: int, batch: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_layout(num, block_samples=40, lanes=lanes, window=16, batch=batch)


def test_positions_of_a_lane_have_its_place_among_all_lanes() -> None:
    order = LaneOrder(layout_of(*SIZES[0]), seed=3)
    positions = np.arange(2 * order.num_samples)
    lanes = positions % order.num_samples % 8
    assert np.array_equal(order.lane_share(positions) / 2**32, lanes / 8)


def test_a_layout_says_what_it_reads_twice_and_which_samples_are_in_no_block() -> None:
    layout = layout_of(*SIZES[0])
    assert layout.reread_share == (5 - 1) / layout.blocks_per_lane
    assert set(layout.singles) and set(layout.block_of(layout.singles)) == {-1}
    assert np.bincount(layout.block_of(np.arange(10_007)) + 1).tolist() == [
        len(layout.singles),
        *[layout.block_samples] * layout.num_blocks,
    ]


def test_lanes_are_as_many_as_divide_the_batch_and_no_window_is_opened_twice_too_often() -> None:
    fits = {"block_samples": 10, "lanes": 4, "window": 2}
    assert MIN_TURNS == 50 and lane_layout(4 * 10 * 2 * 50, **fits) and lane_layout(4 * 10 * 2 * 50 - 1, **fits) is None
    # 7 lanes fit 3,500 samples of blocks of 10 in windows of 1, and 6 divide a batch of 6; of 12 no more than 7 fit, so 6.
    found = [choose_layout(3500, block_samples=10, lanes=0, window=1, batch=b) for b in (5, 6, 7, 12, 1024)]
    assert [one and one.lanes for one in found] == [5, 6, 7, 6, 4]
