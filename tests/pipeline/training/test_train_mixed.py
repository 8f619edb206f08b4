"""A run with the paper's augmentation trains, and two processes compute what one computes."""

import json
import math
from pathlib import Path

import pytest

from pipeline.data.augment.augment_config import nfnet_augment
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.training.run import Run, dump_yaml
from tests.pipeline import processes


def losses(digits: str, folder: Path, num_processes: int) -> list[float]:
    run = Run(
        name="mixed",
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(url=digits),
        augment=nfnet_augment(1, image_px=16),
        optim=OptimConfig(learning_rate=0.2, label_smoothing=0.1),
        global_batch=32,
        micro_batch=8,
        duration=Duration(6, "steps"),
        log_every_steps=1,
        save_final=False,
    )
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_yaml(run))
    arguments = (folder / "recipe.yaml", folder / "run", folder / "log.jsonl", {})
    processes.run("train_run.py", *arguments, num_processes=num_processes)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == "Step"]


def test_a_run_on_mixed_batches_starts_from_the_loss_of_knowing_nothing(digits: str, tmp_path: Path) -> None:
    found = losses(digits, tmp_path / "one", 1)
    assert len(set(found)) == 6 and found[0] == pytest.approx(math.log(10), abs=0.1)


@pytest.mark.slow
def test_mixed_batches_give_the_same_losses_at_one_and_two_processes(digits: str, tmp_path: Path) -> None:
    one, two = (losses(digits, tmp_path / str(n), n) for n in (1, 2))
    assert len(one) == 6 and all(abs(a - b) < 1e-4 for a, b in zip(one, two, strict=True))
