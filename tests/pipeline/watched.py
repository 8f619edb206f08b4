"""What test_watchdog.py and test_stop.py share: a small run of two ranks, and the program in which things happen to them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import load
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.supervision.hang_detection import WatchdogConfig
from pipeline.training.run import Run, dump_yaml

ROOT = Path(__file__).parents[2]
LIMIT_S = 20.0
STEPS, MICRO_BATCHES = 8, 2


def make_run(digits: str, **changes: Any) -> Run:
    run = Run(
        name="test",
        seed=5,
        model=ModelConfig(name="nfnet_tiny", options={"drop_rate": 0.2, "stochastic_depth": 0.2}),
        data=DataConfig(url=digits, mix_blocks=4, block_mb=0.01),
        augment=AugmentConfig(image_px=16, area_min=0.5, flip=False),
        optim=OptimConfig(learning_rate=0.1, ema_decay=0.9, weight_decay=1e-4),
        engine=EngineConfig(parity_check=False),
        global_batch=16,
        micro_batch=4,
        duration=Duration(STEPS, "steps"),
        eval_every=Duration(4, "steps"),
        save_every=Duration(3, "steps"),
        log_every_steps=1,
        # The machine may be slow: half a minute without an own share of it must not look like a freeze.
        watchdog=WatchdogConfig(limit_s=LIMIT_S, grace_s=90.0),
    )
    return dataclasses.replace(run, **changes)


def runs(run: Run, folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each case, in order; `folder` of a case is under `folder`, and may be that of one before."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_yaml(run))
    cases = [{"events": [], **case, "recipe": str(recipe), "folder": str(folder / case["folder"])} for case in cases]
    program = str(Path(__file__).parent / "programs" / "watched_runs.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, json.dumps(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def state(folder: Path) -> tuple[dict[str, torch.Tensor], checkpoint.Commit]:
    commit = load.resolve(str(folder / "run"), str(folder / "cache"))
    whole = load.load_state(commit, str(folder / "cache"))
    return {f"{k}/{n}": t for k, tensors in whole.items() for n, t in tensors.items()}, commit
