"""The plan of reading against what the order does."""

import re
from pathlib import Path

import numpy as np
import pytest

from orchestration.cli import main
from pipeline.data.format.shards import ShardSample, write_shard
from pipeline.data.loading.data_plan import class_variance_between_blocks, data_plan
from pipeline.data.prepare.adopt import adopt
from pipeline.data.sampling.lanes import LaneOrder, lane_layout
from pipeline.data.sampling.mixture import Mixture
from tests.pipeline.data.sources.trees import image_bytes

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


def test_4096_ranks_fetch_each_block_once_and_a_rank_computes_its_own_share_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_hosts, ranks_per_host, batch = 512, 8, 8192
    num_ranks = num_hosts * ranks_per_host
    layout = lane_layout(batch * 40 + 77, block_samples=4, lanes=512, window=2)
    assert layout is not None
    mixture = Mixture([LaneOrder(layout, 1)])
    host = np.arange(batch) * num_hosts // batch
    fetched = set()
    for step in range(layout.num_samples // batch):
        blocks = layout.block_of(mixture.by_lane(step * batch, batch, slice(None))[2])
        fetched |= set(zip(host[blocks >= 0].tolist(), blocks[blocks >= 0].tolist(), strict=True))
    assert len(fetched) / layout.num_blocks < 1.1
    found = data_plan(layout, batch=batch, num_hosts=num_hosts, ranks_per_host=8, sample_bytes=1.0, samples_per_s=1.0)
    assert found.amplification < 1.1 and found.lanes_per_host == 1
    asked: list[int] = []
    at = LaneOrder.at
    monkeypatch.setattr(LaneOrder, "at", lambda self, places: (asked.append(len(places)), at(self, places))[1])
    for rank in (0, 1234, num_ranks - 1):
        mixture.by_lane(5 * batch, batch, slice(rank * batch // num_ranks, (rank + 1) * batch // num_ranks))
    assert asked == [batch // num_ranks] * 3


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


@pytest.mark.parametrize("is_sorted", [True, False])
def test_the_command_says_how_the_classes_of_a_dataset_mix(
    is_sorted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(1200) // 60
    labels = labels if is_sorted else np.random.default_rng(0).permutation(labels)
    data = image_bytes("a")
    samples = [ShardSample(f"{place:04d}", label, data, "png") for place, label in enumerate(labels.tolist())]
    for number in range(2):
        write_shard(samples[number * 600 : (number + 1) * 600], tmp_path / f"train-{number}.tar")
    made = adopt(str(tmp_path))
    assert made is not None
    block_mb = 3 * made.split("train").num_bytes / 1200 / 1e6
    words = ["--hosts", "1", "--ranks", "2", "--batch", "64", "--lanes", "4", "--lane-blocks", "2"]
    assert main(["data", "plan", str(tmp_path), *words, "--block-mb", str(block_mb)]) == 0
    said = capsys.readouterr().out
    excess = re.search(r"vary at most (\S+) times as in a random draw; (\d+)% of the variance", said)
    assert excess is not None
    if is_sorted:
        assert float(excess[1]) == 1 + 64 / (4 * 2) and int(excess[2]) == 100 and "prepare the dataset anew" in said
    else:
        assert float(excess[1]) < 1.3 and int(excess[2]) < 5


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
