"""Every sample of every epoch is accounted for, and a run that loses too many stops on all ranks together."""

import dataclasses
import gc
import json
import math
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.data.loading.sample_ledger import Ledger, plan
from pipeline.data.sampling.subset import Subset
from pipeline.distributed import World
from pipeline.duration import Duration
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig
from pipeline.supervision.phase_clock import PHASES, Clock
from pipeline.training.run import Run, dump_yaml
from pipeline.training.train import train
from tests.pipeline import processes

AUGMENT = AugmentConfig(image_px=16, area_min=0.5, flip=False)
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def make_run(url: str, **data: Any) -> Run:
    return Run(
        name="test",
        seed=5,
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(url=url, eval_split=None, **data),
        augment=AUGMENT,
        optim=OptimConfig(learning_rate=0.1, warmup=Duration(3, "steps")),
        global_batch=100,
        micro_batch=50,
        duration=Duration(13, "steps"),  # 1,100 images: one epoch is whole, of the second two hundred are used
        log_every_steps=1,
        save_final=False,
    )


@pytest.fixture
def damaged(digits: str, tmp_path: Path) -> tuple[str, list[str]]:
    """A copy in which five images have lost their first bytes, and their keys in the order in which they are drawn."""
    url = tmp_path / "damaged"
    shutil.copytree(digits, url)
    index = Manifest.open(str(url)).split("train")
    for row in (7, 200, 201, 650, 1000):
        with (url / index.shards[int(index.shard[row])].name).open("r+b") as file:
            file.seek(int(index.offset[row]))
            file.write(b"\0" * 16)
    return str(url), [str(index.keys[row]) for row in (7, 200, 201, 650, 1000)]


def records_of(run: Run, out: Path) -> list[Any]:
    return list(train(run, str(out)))


def test_the_ledger_of_a_run_with_losses_adds_up_to_the_manifest(
    damaged: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, keys = damaged
    records = records_of(make_run(url, max_lost_samples=5), tmp_path / "run")
    pages = json.loads((tmp_path / "run" / "ledger.json").read_text())["pages"]
    first, second = pages
    assert {e["key"] for e in first["entries"]} == set(keys) and first["skipped"] == 5 == first["repeated"]
    assert (first["used"], first["dropped"]) == (1095, 0)
    assert second["used"] + second["skipped"] == 200 and second["dropped"] == 900
    for page in pages:
        assert page["used"] + page["skipped"] + page["dropped"] + page["excluded"] == page["manifest"] == 1100
    lost = [r for r in records if type(r).__name__ == "Lost"]
    assert sum(len(r.samples) for r in lost) == first["skipped"] + second["skipped"]
    assert all("bytes have changed" in s["reason"] and s["filled_with"] not in keys for r in lost for s in r.samples)
    accounts = [r for r in records if type(r).__name__ == "Accounted"]
    assert [a.epoch for a in accounts] == [0, None] and accounts[1].used == first["used"] + second["used"]


def test_a_run_over_its_budget_stops_on_all_ranks_at_one_step(damaged: tuple[str, list[str]], tmp_path: Path) -> None:
    run = make_run(damaged[0], max_lost_share=0.0, max_lost_samples=2)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(run))
    processes.run("train_run.py", tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "log", {}, num_processes=2)
    said = [json.loads(Path(f"{tmp_path}/log.rank{rank}").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] and "more than data.max_lost_share allows in an epoch (2)" in said[0][1]
    # The third lost image, wherever it is drawn, is the one; its step was not applied and the steps before it were.
    data = TrainData(run.data, AUGMENT, seed=5)
    bad = [i for i, key in enumerate(data.index.keys) if key in damaged[1]]
    lost = np.cumsum([np.isin(data.draw(step, 100)[1], bad).sum() for step in range(11)])
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert said[0][0] == max(r["step"] for r in records if r["kind"] == "Step") == int((lost <= 2).sum())
    # What that step lost belongs to no used step: the account is the one of the steps before it.
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    (page,) = ledger["pages"]
    assert ledger["step"] == said[0][0] and page["used"] + page["skipped"] == 100 * ledger["step"]
    assert page["skipped"] == len(page["entries"]) == page["repeated"] == lost[ledger["step"] - 1]
    assert all(entry["step"] < ledger["step"] for entry in page["entries"])


def test_a_micro_batch_without_one_readable_image_stops_the_run_whatever_the_budget(
    digits: str, tmp_path: Path
) -> None:
    url = tmp_path / "gone"
    shutil.copytree(digits, url)
    for path in url.glob("train-*.tar"):
        path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match="step 0 lost 100 images"):
        records_of(make_run(str(url), max_lost_share=1.0), tmp_path / "run")


def test_a_resumed_run_keeps_its_account(damaged: tuple[str, list[str]], tmp_path: Path) -> None:
    run = make_run(damaged[0], max_lost_samples=5)
    whole = dataclasses.replace(run, save_every=Duration(4, "steps"))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(whole))
    words = (tmp_path / "recipe.yaml", tmp_path / "run", tmp_path / "log")
    with pytest.raises(AssertionError):
        processes.run("train_run.py", *words, {"kill_at": 10})
    processes.run("train_run.py", *words, {})
    records_of(run, tmp_path / "unbroken")
    ours, theirs = (json.loads((tmp_path / name / "ledger.json").read_text())["pages"] for name in ("run", "unbroken"))
    assert ours == theirs and ours[0]["skipped"] == 5


def test_a_resumed_run_whose_account_is_gone_says_so(digits: str, tmp_path: Path) -> None:
    run = dataclasses.replace(make_run(digits), duration=Duration(2, "steps"), save_final=True)
    run = dataclasses.replace(run, optim=OptimConfig(learning_rate=0.1, warmup=Duration(1, "steps")))
    for gone, said in ((False, 0), (True, 1)):
        if gone:
            (tmp_path / "run" / "ledger.json").unlink()
        notices = [r for r in records_of(run, tmp_path / "run") if "not in the account" in getattr(r, "text", "")]
        assert len(notices) == said and all("lost before step 2" in r.text for r in notices)


def test_plan_and_account_of_repeats_a_subset_and_skipped_steps(digits: str) -> None:
    config = DataConfig(url=digits, subset=Subset(per_class=50), repeats=2, skip_steps=("3:5",))
    data = TrainData(config, AUGMENT, seed=0)
    ledger = Ledger(data, global_batch=100)
    (first, second) = ledger.pages(10)
    assert (first.used, first.skipped, first.dropped, first.excluded, first.repeated) == (400, 100, 0, 600, 400)
    assert (second.used, second.dropped) == (100, 400) and second.manifest == 1100
    text = " | ".join(plan(data, global_batch=100, total_steps=10))
    for fact in ("500 of 1,100", "1.20 passes", "600 are not in the subset", "400 of the last pass are dropped",
                 "each image comes 2 times", "steps 3 to 4 are skipped, 200 images"):  # fmt: skip
        assert fact in text
    plain = TrainData(dataclasses.replace(config, skip_steps=()), AUGMENT, seed=0)
    drawn = [data.draw(step, 100)[1].tolist() for step in range(6)]
    assert drawn == [plain.draw(step, 100)[1].tolist() for step in (0, 1, 2, 5, 6, 7)]


def test_repeated_images_come_so_often_in_their_batch_and_differ(digits: str) -> None:
    data = TrainData(DataConfig(url=digits, repeats=3), AUGMENT, seed=0)
    (batch,) = data.batches(steps=range(1), global_batch=30, micro_batch=30, world=ALONE)
    assert np.unique(batch.samples, return_counts=True)[1].tolist() == [3] * 10
    assert not torch.equal(batch.images[0], batch.images[10]) and batch.samples[0] == batch.samples[10]
    with pytest.raises(UserError, match=r"multiple of data\.repeats"):
        data.distinct(100)


def test_a_mixture_is_drawn_from_both_sets_with_one_numbering_of_classes(digits: str, tmp_path: Path) -> None:
    from PIL import Image

    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.sources.cards import load_card

    other = str(tmp_path / "other")
    for split, name in (("train", "7"), ("train", "x"), ("val", "7"), ("val", "x")):
        folder = tmp_path / "raw" / split / name
        folder.mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (8, 8), (i, ord(name), len(split))).save(folder / f"{i}.png")
    prepare(load_card("images"), other, source=str(tmp_path / "raw"))
    data = TrainData(DataConfig(url=digits, mixture=(f"{other}=0.25",), url_weight=0.75), AUGMENT, seed=0)
    assert data.classes == [*map(str, range(10)), "x"]
    batches = list(data.batches(steps=range(10), global_batch=100, micro_batch=100, world=ALONE))
    numbers = np.concatenate([b.samples for b in batches])
    labels = np.concatenate([b.labels for b in batches])
    is_other = numbers >= 1100
    assert abs(is_other.mean() - 0.25) < 0.005
    names = data.manifests[1].classes
    expected = [names[k] for k in data.indices[1].label[numbers[is_other] - 1100]]
    assert [data.classes[k] for k in labels[is_other]] == expected
    assert data.key(int(numbers[is_other][0])) == data.indices[1].keys[numbers[is_other][0] - 1100]


# --- time and memory --------------------------------------------------------------------------------------------------


def test_a_slow_read_shows_under_data_wait_and_the_phases_add_up_to_the_wall_clock(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.loading import batches

    original = batches.BatchStream._batch

    def slow(self: Any, reading: Any) -> Any:
        time.sleep(0.2)
        return original(self, reading)

    monkeypatch.setattr(batches.BatchStream, "_batch", slow)
    marks, steps = [], []
    for record in train(dataclasses.replace(make_run(digits), duration=Duration(6, "steps")), str(tmp_path / "run")):
        if type(record).__name__ in ("Phase", "Step"):
            marks.append(time.perf_counter())
        if type(record).__name__ == "Step":
            steps.append(record)
            time.sleep(0.1)  # a slow reader of records
    for step, begin, end in zip(steps[1:], marks[-6:], marks[-5:], strict=False):
        parts = [getattr(step, "data_wait_s" if name == "wait" else f"{name}_s") for name in PHASES]
        assert math.isclose(sum(parts), step.wall_s, rel_tol=1e-6)
        assert abs(step.wall_s - (end - begin)) < 0.02 * step.wall_s
        # Two delays of a fifth of a second in reading, one of a tenth in whoever reads records: there, and nowhere else.
        assert step.data_wait_s > 0.4 and 0.1 < step.log_s < 0.3
        assert step.transfer_s + step.other_s + step.save_s + step.evaluate_s < 0.2
    print("other:", sorted(f"{step.other_s / step.wall_s:.1%}" for step in steps))


def test_a_moment_belongs_to_one_phase() -> None:
    now_s = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock = Clock(lambda: next(now_s))
    with clock("compute"), clock("wait"):
        pass
    wall_s, spent_s = clock.take()
    assert wall_s == 15.0
    assert {k: v for k, v in spent_s.items() if v} == {"other": 1.0 + 5.0, "compute": 2.0 + 4.0, "wait": 3.0}


def test_memory_stays_flat_over_twenty_epochs(digits: str) -> None:
    data = TrainData(DataConfig(url=digits, read_ahead_mb=1, subset=Subset(per_class=50)), AUGMENT, seed=0)
    stream = data.batches(steps=range(100), global_batch=100, micro_batch=100, world=ALONE)
    sizes = []
    tracemalloc.start()
    try:
        for number, _ in enumerate(stream):
            if number % 10 == 9:
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(sizes) == 10 and max(sizes[3:]) < max(sizes[1:3]) + (
        256 << 10
    )  # at the end nothing is read ahead any more
