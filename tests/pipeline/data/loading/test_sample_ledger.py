"""The account of every sample against one that counts position by position."""

import json
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.data.loading.batches import UnreadableSample
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.loading.sample_ledger import Ledger, plan
from pipeline.data.sampling.mixture import Mixture
from pipeline.storage import objects

BATCH = 6


def draws(num: int) -> Any:
    """An order without a shuffle: sample p of epoch e at position e * num + p."""

    def positions(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        epochs, samples = np.divmod(np.arange(start, start + count), num)
        return epochs, samples

    return SimpleNamespace(num_samples=num, positions=positions)


def made(pools: tuple[int, ...], weights: tuple[float, ...] = (1.0,), **config: Any) -> Any:
    """What the ledger asks of `TrainData`, over sources of which two samples each are in no subset."""
    config = DataConfig(url="a", **config)
    mixture = Mixture([draws(n) for n in pools], weights)
    data = SimpleNamespace(
        config=config,
        mixture=mixture,
        pools=[np.arange(n) for n in pools],
        indices=[SimpleNamespace(num_samples=n + 2) for n in pools],
        layouts=[None for _ in pools],
        names=[f"source {i}" for i in range(len(pools))],
        num_samples=mixture.num_samples,
        lost_allowed=3,
        faults=[],
        distinct=lambda batch: batch // config.repeats,
    )
    data.keys = lambda step, batch: [
        (s, e, "t.tar", f"{k}") for s, e, k in drawn(data, [config.data_step(step)], batch)
    ]
    return data


def drawn(data: Any, data_steps: Iterable[int], batch: int = BATCH) -> list[tuple[int, int, int]]:
    """(source, epoch, sample) of each different sample of these steps of the data."""
    size = data.distinct(batch)
    return [
        p
        for step in data_steps
        for p in zip(*(a.tolist() for a in data.mixture.positions(step * size, size)), strict=True)
    ]


@pytest.mark.parametrize(
    ("pools", "weights", "config"),
    [
        ((10,), (1.0,), {}),
        ((10,), (1.0,), {"repeats": 2}),
        ((10, 7), (0.5, 0.5), {}),
        ((10, 3, 40), (0.6, 0.3, 0.1), {"repeats": 3, "skip_steps": ("2:4", "7:8")}),
        ((5,), (1.0,), {"skip_steps": ("0:3", "5:6")}),
    ],
)
def test_pages_are_what_counting_each_position_gives(
    pools: tuple[int, ...], weights: tuple[float, ...], config: dict[str, Any]
) -> None:
    data = made(pools, weights, **config)
    ledger = Ledger(data, global_batch=BATCH)
    for step in range(12):
        steps = [data.config.data_step(s) for s in range(step)]
        reach = steps[-1] + 1 if steps else 0
        by_name = Counter(p[:2] for p in drawn(data, sorted(set(range(reach)) - set(steps))))
        used = Counter(p[:2] for p in drawn(data, steps))
        pages = {(data.names.index(p.source), p.epoch): p for p in ledger.pages(step)}
        assert pages.keys() == used.keys() | by_name.keys()
        assert [(data.names.index(p.source), p.epoch) for p in ledger.pages(step)] == sorted(pages)
        for key, page in pages.items():
            assert (page.used, page.skipped) == (used[key], by_name[key])
            assert (page.manifest, page.excluded) == (pools[key[0]] + 2, 2)
            assert page.used + page.skipped + page.dropped + page.excluded == page.manifest
            assert page.repeated == page.used * (data.config.repeats - 1)
        assert ledger.epochs(step) == reach * data.distinct(BATCH) / sum(pools)
    assert Ledger(data, global_batch=BATCH).page(0, 99, 3).dropped == pools[0]


def lose(ledger: Ledger, step: int, key: str, *, epoch: int = 0, filled_with: str = "x") -> None:
    ledger.lost(step, [UnreadableSample(0, epoch, "t.tar", key, "cut", filled_with)])


def test_losses_are_skipped_once_filled_and_only_those_of_steps_that_were_used() -> None:
    ledger = Ledger(made((10,)), global_batch=BATCH)
    for step, key in ((0, "1"), (0, "1"), (1, "7"), (2, "3")):
        lose(ledger, step, key, epoch=step // 2, filled_with="" if key == "7" else "x")
    page = ledger.page(0, 0, 2)
    assert (page.used, page.skipped, page.repeated, len(page.entries)) == (8, 2, 2, 3)
    assert ledger.page(0, 0, 1).skipped == 1 and ledger.page(0, 1, 2).entries == ()
    assert [page.epoch for page in ledger.closed(2)] == [0] and ledger.closed(2) == []
    with pytest.raises(RuntimeError, match="epoch 0 does not add up"):
        for key in "abcdefghi":
            lose(ledger, 1, key)
        ledger.page(0, 0, 2)


def test_each_sources_passes_with_losses_are_told_once() -> None:
    ledger = Ledger(made((6, 12), (0.5, 0.5)), global_batch=BATCH)
    ledger.lost(0, [UnreadableSample(1, 0, "t.tar", "1", "cut", "x")])
    told = [[(p.source, p.epoch) for p in ledger.closed(step)] for step in range(9)]
    assert [t for t in told if t] == [[("source 1", 0)]]


def test_an_update_that_is_left_out_used_no_sample() -> None:
    ledger = Ledger(made((10,)), global_batch=BATCH)
    ledger.skipped(1, "not finite")
    first, second = ledger.pages(3)
    assert (first.used, first.skipped, second.used, second.skipped) == (6, 4, 6, 2) and first.repeated == 0
    assert {(e.step, e.key, e.reason) for e in first.entries} == {(1, k, "not finite") for k in "6789"}
    assert ledger.lost_since_epoch_began(1) == 0  # nothing was unreadable


def test_the_budget_counts_the_filled_losses_of_the_epoch_in_which_a_step_begins() -> None:
    ledger = Ledger(made((12,)), global_batch=BATCH)  # an epoch is two steps
    for step in (0, 1, 2, 3):
        lose(ledger, step, f"{step}", epoch=step // 2)
    lose(ledger, 3, "9", epoch=1, filled_with="")
    assert [ledger.lost_since_epoch_began(step) for step in range(5)] == [4, 4, 2, 2, 0]


def test_what_was_lost_goes_on_after_a_resume_and_later_losses_do_not(tmp_path: Any) -> None:
    ledger = Ledger(made((10, 10), (0.5, 0.5)), global_batch=BATCH)
    lose(ledger, 0, "1")
    lose(ledger, 5, "4", epoch=1)
    objects.write_bytes(tmp_path / "ledger.json", ledger.to_json(6))
    content = json.loads((tmp_path / "ledger.json").read_text())
    assert (content["format"], content["step"]) == ("normfree-ledger", 6)
    again = Ledger(made((10, 10), (0.5, 0.5)), global_batch=BATCH)
    found = again.read(str(tmp_path), 5)
    assert {key: [e.key for e in entries] for key, entries in found.items()} == {(0, 0): ["1"]}
    assert found is not None
    again.restore(found, 5)
    assert again.closed(5) == [] and again.pages(5)[0].skipped == 1
    assert again.read(str(tmp_path / "nothing"), 5) is None
    ledger.rewind(5)
    assert ledger.to_json(5) == again.to_json(5) and ledger.closed(7) == []


def test_losses_of_a_source_that_the_run_no_longer_has_are_passed_over(tmp_path: Any) -> None:
    ledger = Ledger(made((10, 10), (0.5, 0.5)), global_batch=BATCH)
    ledger.lost(0, [UnreadableSample(source, 0, "t.tar", "1", "cut", "x") for source in (0, 1)])
    objects.write_bytes(tmp_path / "ledger.json", ledger.to_json(6))
    found = Ledger(made((10,)), global_batch=BATCH).read(str(tmp_path), 6)
    assert found is not None and set(found) == {(0, 0)}


def test_passes_with_equal_numbers_share_a_line_and_those_with_losses_do_not() -> None:
    ledger = Ledger(made((6,)), global_batch=BATCH)
    lose(ledger, 2, "1", epoch=2)
    pages = json.loads(ledger.to_json(6))["pages"]
    assert [(p["epochs"], p["used"], len(p["entries"])) for p in pages] == [
        ([0, 1], 6, 0),
        ([2, 2], 5, 1),
        ([3, 5], 6, 0),
    ]


def test_the_plan_says_what_becomes_of_the_samples() -> None:
    lines = plan(made((10, 30), (0.25, 0.75), repeats=2, skip_steps=("1:3",)), global_batch=8, total_steps=12)
    for words in (
        "source 0: 10 of 12 images, 1.40 passes, 25.0% of each batch; 2 are not in the subset; 6 of the last pass are dropped",
        "source 1: 30 of 32 images, 1.40 passes, 75.0% of each batch; 2 are not in the subset; 18 of the last pass",
        "each image comes 2 times in its batch: 4 different ones of 8, 40 repeated an epoch",
        "the data of steps 1 to 2 are skipped, 16 images, as asked",
        "unreadable images allowed an epoch: 3",
    ):
        assert words in "\n".join(lines), (words, lines)
    ledger = Ledger(made((10,)), global_batch=8)
    assert (ledger.epochs(0), ledger.epochs(5)) == (0.0, 4.0)
    assert not [
        line for line in plan(made((10,)), global_batch=8, total_steps=12) if "times" in line or "% of each" in line
    ]


def test_losses_that_cannot_be_are_a_fault_of_ours() -> None:
    ledger = Ledger(made((10,)), global_batch=BATCH)
    for key in "012345678":
        lose(ledger, 0, key)
    with pytest.raises(RuntimeError, match="does not add up: 9 skipped of 6"):
        ledger.page(0, 0, 1)
