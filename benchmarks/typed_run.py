"""What a run costs beside a loop of ten lines: the engine alone, and `normfree pretrain` as it is typed.

The bare loop has the same network on one batch in memory: forward, loss, backward, torch's SGD; no clipping, no averaged
weights, no data. The engine has its own update beside that, and the command data from shards, the account of samples,
records, the tracker and pictures; the evaluation and the save come after its last step and are not timed. Two threads each;
the command's loader works on the same cores. Two runs: the demo's, of a network so small that reading its images counts, and
NFNet-F0 on photographs' size with its recipe's augmentation.
"""

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nfnet
from benchmarks.turns import hardware, race
from nfnet.optim.losses import label_smoothing_cross_entropy
from pipeline import recipes
from pipeline.distributed import join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine

ROUNDS = 3
NORMFREE = (sys.executable, "-m", "normfree")
ENGINE, COMMAND = 0.98, 0.95
"""The bare loop's time over ours, to reach."""


@dataclasses.dataclass(frozen=True)
class Typed:
    """A run as it is typed; `warm` are the steps that are not timed."""

    recipe: str
    classes: int
    warm: int
    data: str
    fields: str
    batch: int
    px: int


TINY = Typed("nfnet_tiny_glyphs", 325, 32, "glyphs", "--duration '1 epochs'", batch=128, px=32)
F0 = Typed(
    "nfnet_f0_imagenet",
    2,
    3,
    "images --source photos",
    "--duration '12 steps' --optim.warmup '4 steps' --optim.learning_rate 0.01 --engine.precision fp32 "
    "--engine.zero_stage 0 --global_batch 16 --micro_batch 16 --log_every_steps 1",
    batch=16,
    px=192,
)


class Bare:
    """A step of the bare loop."""

    def __init__(self, of: Typed) -> None:
        torch.manual_seed(0)
        model = recipes.get(of.recipe).model
        self.network = nfnet.create_model(model.name, num_classes=of.classes, **model.options).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        self.images = torch.randn(of.batch, 3, of.px, of.px).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(of.classes, (of.batch,))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        label_smoothing_cross_entropy(self.network(self.images), self.labels, 0.1).backward()
        self.optimizer.step()


def _engine() -> None:
    run = recipes.get(TINY.recipe)
    bare, world = Bare(TINY), join()
    network = nfnet.create_model(run.model.name, num_classes=TINY.classes, **run.model.options)
    engine = Engine(
        network, optim=run.optim, config=EngineConfig(), world=world, micro_batch=TINY.batch, accumulation=1
    )

    def step() -> None:
        engine.forward_backward(bare.images, bare.labels, is_last=True)
        engine.update(0.01)

    race("the engine", {"engine": step, "bare loop": bare}, ours="engine", target=ENGINE, rounds=21)
    engine.close()
    leave()


def _photos(folder: Path) -> None:
    """JPEGs of ImageNet's usual size: smooth noise."""
    rng = np.random.default_rng(0)
    for i in range(256):
        path = folder / ("val" if i < 8 else "train") / f"{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (47, 63, 3), np.uint8)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)


def _typed(of: Typed, folder: Path, turn: int) -> tuple[float, float]:
    """Seconds an update of the command, after its first ones, and of the bare loop."""
    out = folder / f"{of.recipe}-{turn}"
    command = ["pretrain", of.recipe, "--data.url", str(folder / "data"), *shlex.split(of.fields)]
    command += ["--out", str(out), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    subprocess.run([*NORMFREE, *command], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "Step"]
    begin = next(row for row in steps if row["step"] >= of.warm)
    command_s = (steps[-1]["time_s"] - begin["time_s"]) / (steps[-1]["step"] - begin["step"])
    bare, times = Bare(of), []
    for _ in range(min(of.warm * 3, 32)):
        start = time.perf_counter()
        bare()
        times.append(time.perf_counter() - start)
    return command_s, statistics.median(times)


def _race(of: Typed) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "photos" in of.data:
            _photos(folder / "photos")
        words = ["data", "prepare", *of.data.split(), "--out", str(folder / "data")]
        subprocess.run([*NORMFREE, *words], check=True, stdout=subprocess.DEVNULL, cwd=folder)
        turns = [_typed(of, folder, turn) for turn in range(ROUNDS)]
    ratios = sorted(bare_s / command_s for command_s, bare_s in turns)
    ratio = statistics.median(ratios)
    print(f"normfree pretrain {of.recipe}, batch {of.batch} at {of.px} px  [{hardware()}]")
    for what, seconds in zip(
        ("the command", "bare loop"), map(statistics.median, zip(*turns, strict=True)), strict=True
    ):
        print(f"  {what:44s} {seconds * 1e3:9.1f} ms a step")
    verdict = "reached" if ratio >= COMMAND else "missed"
    print(f"  ratio: {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}); target {COMMAND:.2f} {verdict}", flush=True)


def main() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    _engine()
    _race(TINY)
    _race(F0)


if __name__ == "__main__":
    main()
