"""What a run costs beside a loop of ten lines: the engine alone, and `normfree pretrain` as it is typed.

The bare loop has the same network on one batch in memory: forward, loss, backward, torch's SGD; no clipping, no averaged
weights, no data. The engine has its own update beside that, and the command data from shards, the account of samples,
records, the tracker and pictures; the evaluation and the save come after its last step and are not timed. Two threads each;
the command's loader works on the same cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import nfnet
from benchmarks.turns import hardware, race
from nfnet.optim.losses import label_smoothing_cross_entropy
from pipeline import recipes
from pipeline.distributed import join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine

RECIPE, CLASSES, WARM, ROUNDS = "nfnet_tiny_glyphs", 325, 32, 3
ENGINE, COMMAND = 0.98, 0.95
"""The bare loop's time over ours, to reach."""


class Bare:
    """A step of the bare loop."""

    def __init__(self, batch: int, px: int) -> None:
        torch.manual_seed(0)
        self.network = nfnet.create_model("nfnet_tiny", num_classes=CLASSES).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        self.images = torch.randn(batch, 3, px, px).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (batch,))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        label_smoothing_cross_entropy(self.network(self.images), self.labels, 0.1).backward()
        self.optimizer.step()


def _engine() -> None:
    run = recipes.get(RECIPE)
    bare, world = Bare(run.global_batch, run.augment.image_px), join()
    network = nfnet.create_model("nfnet_tiny", num_classes=CLASSES)
    engine = Engine(
        network, optim=run.optim, config=EngineConfig(), world=world, micro_batch=run.global_batch, accumulation=1
    )

    def step() -> None:
        engine.forward_backward(bare.images, bare.labels, is_last=True)
        engine.update(0.01)

    race("the engine", {"engine": step, "bare loop": bare}, ours="engine", target=ENGINE, rounds=21)
    engine.close()
    leave()


def _typed(folder: Path, turn: int) -> tuple[float, float]:
    """Seconds an update of the command, after its first ones, and of the bare loop."""
    out = folder / f"run-{turn}"
    command = [sys.executable, "-m", "normfree", "pretrain", RECIPE, "--data.url", str(folder / "glyphs")]
    command += ["--duration", "1 epochs", "--out", str(out), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "Step"]
    begin = next(row for row in steps if row["step"] >= WARM)
    command_s = (steps[-1]["time_s"] - begin["time_s"]) / (steps[-1]["step"] - begin["step"])
    run = recipes.get(RECIPE)
    bare = Bare(run.global_batch, run.augment.image_px)
    times = []
    for _ in range(WARM):
        start = time.perf_counter()
        bare()
        times.append(time.perf_counter() - start)
    return command_s, statistics.median(times)


def main() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    _engine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [sys.executable, "-m", "normfree", "data", "prepare", "glyphs", "--out", str(folder / "glyphs")]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        turns = [_typed(folder, turn) for turn in range(ROUNDS)]
    ratios = sorted(bare_s / command_s for command_s, bare_s in turns)
    ratio = statistics.median(ratios)
    print(f"normfree pretrain {RECIPE}  [{hardware()}]")
    for what, seconds in zip(
        ("the command", "bare loop"), map(statistics.median, zip(*turns, strict=True)), strict=True
    ):
        print(f"  {what:44s} {seconds * 1e3:9.1f} ms a step")
    verdict = "reached" if ratio >= COMMAND else "missed"
    print(f"  ratio: {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}); target {COMMAND:.2f} {verdict}", flush=True)


if __name__ == "__main__":
    main()
