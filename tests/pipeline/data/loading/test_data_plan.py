"""The plan of reading against what the order does."""

import numpy as np
import pytest

from orchestration.cli import main
from pipeline.data.loading.data_plan import class_variance_between_blocks, data_plan
from pipeline.data.sampling.lanes import LaneOrder, lane_layout
from pipeline.data.sampling.mixture import Mixture

LAYOUT = lane_layout(10_007, block_samples=16, lanes=8, window=5, min_turns=4)
assert LAYOUT is not None


@pytest.mark.parametrize("num_hosts", [1, 2, 8, 16])
def test_blocks_that_hosts_fetch_are_those_of_the_plan(num_hosts: int) -> None:
    batch = 64
    mixture = Mixture([LaneOrder(LAYOUT, 1)])
    fetched = 0
    for host in range(num_hosts):
        part = slice(host * batch // num_hosts, (host + 1) * batch // num_hosts)
        samples = [mixture.by_lane(step * batch, batch, part)[2] for step in range(10_007 // batch)]
        fetched += len(set(LAYOUT.block_of(np.concatenate(samples)).tolist()) - {-1})
    found = data_plan(LAYOUT, batch=batch, num_hosts=num_hosts, ranks_per_host=1, sample_bytes=1.0, samples_per_s=1.0)
    without_wrap = found.amplification / (1 + LAYOUT.reread_share)
    assert fetched / LAYOUT.num_blocks == pytest.approx(without_wrap, abs=0.02)


@pytest.mark.parametrize(("block", "lanes", "window"), [(16, 8, 5), (80, 8, 4), (9, 4, 16)])
def test_neighbours_meet_as_often_as_the_plan_says(block: int, lanes: int, window: int) -> None:
    layout = lane_layout(40_000, block_samples=block, lanes=lanes, window=window, min_turns=4)
    assert layout is not None
    met = pairs = 0
    for epoch in range(3):
        batch = np.empty(layout.num_samples, np.int64)
        samples = LaneOrder(layout, 1).positions(epoch * layout.num_samples, layout.num_samples)[1]
        batch[samples] = np.arange(layout.num_samples) // 64
        blocks = layout.block_of(np.arange(layout.num_samples))
        beside = (blocks[1:] == blocks[:-1]) & (blocks[1:] >= 0)
        met += int((batch[1:] == batch[:-1])[beside].sum())
        pairs += int(beside.sum())
    found = data_plan(layout, batch=64, num_hosts=1, ranks_per_host=1, sample_bytes=1.0, samples_per_s=1.0)
    assert met / pairs * (layout.num_samples - 1) / 63 == pytest.approx(found.neighbours, rel=0.08)


def test_how_much_classes_differ_between_blocks() -> None:
    labels = np.repeat(np.arange(100), 160)
    assert class_variance_between_blocks(labels, 16) == pytest.approx(1.0)
    shuffled = np.random.default_rng(0).permutation(labels)
    assert class_variance_between_blocks(shuffled, 16) < 0.01


def test_the_command_says_what_300_million_images_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", "--samples", "300e6", "--hosts", "64", "--ranks", "8"]) == 0
    found = capsys.readouterr().out
    assert "512 of 15,024 blocks" in found and "1.001 times the dataset" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "300e6", "--hosts", "3"], "do not divide a global batch of 4096"),
        ([], "either URL or --samples"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "plan", *arguments]) == 2
    assert message in capsys.readouterr().err
