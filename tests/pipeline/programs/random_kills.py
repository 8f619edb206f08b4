"""Run by test_reshard.py: 20 steps on two ranks, killed (SIGKILL) at random moments and started again until they are done.

Each stage runs once in peace first; what comes after a kill is compared with that: every step's record, every sample's key and
pixels, and the state that the last checkpoint holds. Prints one JSON object a run that was killed.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import torch

from pipeline.checkpoint import load
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.batches import Batch
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.distributed import World
from pipeline.duration import Duration
from pipeline.engine.engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.records import Step
from pipeline.training.run import Run
from pipeline.training.train import train

RANKS, STEPS, GLOBAL_BATCH, KILLS_A_RUN = 2, 20, 16, 2
EXACT = ("loss", "accuracy", "learning_rate", "clipped_share", "gradient_norm", "samples")


def make_run(digits: str, stage: int) -> Run:
    return Run(
        name="test",
        seed=3,
        model=ModelConfig(name="nfnet_tiny", options={"drop_rate": 0.2, "stochastic_depth": 0.2}),
        data=DataConfig(url=digits, mix_blocks=4, block_mb=0.01, eval_split=None),
        augment=AugmentConfig(image_px=16, area_min=0.5, mixup_alpha=0.2, cutmix_alpha=1.0),
        optim=OptimConfig(learning_rate=0.1, warmup=Duration(3, "steps"), ema_decay=0.9, weight_decay=1e-4),
        engine=EngineConfig(zero_stage=stage, parity_check=False),  # type: ignore[arg-type]
        global_batch=GLOBAL_BATCH,
        micro_batch=4,
        duration=Duration(STEPS, "steps"),
        save_every=Duration(5, "steps"),
        log_every_steps=1,
    )


def live(run: Run, folder: Path, me: World) -> None:
    """One life of a run on this rank: what each step used and came to, a line each, in a file of the rank."""
    with (folder / f"seen{me.rank}").open("a") as log:

        def say(**fields: Any) -> None:
            log.write(json.dumps(fields) + "\n")
            log.flush()

        batches = TrainData.batches

        def watched(data: TrainData, *, steps: range, **options: Any) -> Iterator[Batch]:
            per_step = GLOBAL_BATCH // options["micro_batch"] // me.size
            for i, batch in enumerate(batches(data, steps=steps, **options)):
                keys = [data.key(int(s)) for s in batch.samples]
                say(step=steps.start + i // per_step + 1, micro=i % per_step, keys=keys, sums=pixel_sums(batch))
                yield batch

        TrainData.batches = watched  # type: ignore[method-assign]
        for record in train(run, str(folder / "run")):
            if isinstance(record, Step):
                say(step=record.step, **{name: getattr(record, name) for name in EXACT})
        say(done=True)


def pixel_sums(batch: Batch) -> list[int]:
    """Of each image, weighted by place: another crop or partner is another number."""
    flat = batch.images.flatten(1).long()
    return (flat * torch.arange(1, flat.shape[1] + 1)).sum(1).tolist()


def seen(folder: Path) -> tuple[dict[str, Any], list[str], bool]:
    """What was said of each step and micro-batch by each rank; where two lives disagree; whether all ranks got through."""
    found: dict[str, Any] = {}
    differs, num_done = [], 0
    for rank in range(RANKS):
        path = folder / f"seen{rank}"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut by the kill
            if fields.pop("done", False):
                num_done += 1
                continue
            place = f"rank {rank} step {fields.pop('step')} micro {fields.pop('micro', '-')}"
            if found.setdefault(place, fields) != fields:
                differs.append(place)
    return found, differs, num_done >= RANKS


def state(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    commit = load.resolve(str(folder / "run"), str(folder / "cache"))
    whole = load.load_state(commit, str(folder / "cache"))
    return {f"{k}/{n}": t for k, tensors in whole.items() for n, t in tensors.items()}, commit.step


def run_once(run: Run, folder: Path, kill_after_s: float | None, draw: random.Random) -> tuple[float, bool]:
    """A life: how long it lasted, and whether it was killed: one rank first, the other as the launcher would."""
    begin = time.monotonic()
    pids = forked.start(RANKS, lambda me: live(run, folder, me), folder / "log")
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        draw.shuffle(pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still this process's
            time.sleep(draw.random() * 0.02)
    codes = forked.wait(pids)
    was_killed = -signal.SIGKILL in codes
    if not was_killed and codes != [0] * RANKS:
        raise RuntimeError(f"ranks ended with {codes}: {(folder / 'log').read_text()[-3000:]}")
    return time.monotonic() - begin, was_killed


def case(run: Run, folder: Path, peace: Path, life_s: float, num_kills: int, draw: random.Random) -> dict[str, Any]:
    killed = 0
    for _ in range(num_kills):  # the first from anywhere in a run, later ones from what may be left of it
        killed += run_once(run, folder, draw.uniform(0.1, 1.0) * life_s, draw)[1]
    while not seen(folder)[2]:
        run_once(run, folder, None, draw)
    ours, differs, _ = seen(folder)
    theirs = seen(peace)[0]
    differs += [place for place in theirs if ours.get(place) != theirs[place]]
    (tensors, step), (expected, _) = state(folder), state(peace)
    differs += [k for k in expected if k not in tensors or not torch.equal(tensors[k], expected[k])]
    assert {k.split("/")[0] for k in expected} == {"weights", "momentum", "ema"} and len(theirs) > STEPS * RANKS
    return {"stage": run.engine.zero_stage, "num_kills": killed, "step": step, "differs": differs}


def main() -> None:
    digits, kills, stages, seed = sys.argv[1], *(json.loads(word) for word in sys.argv[2:5])
    draw = random.Random(seed)
    forked.prepare()
    with tempfile.TemporaryDirectory() as name:
        whole: dict[int, tuple[Path, float]] = {}
        total = turn = 0
        while total < kills:
            stage = stages[turn % len(stages)]
            run = make_run(digits, stage)
            if stage not in whole:
                peace = Path(name) / f"peace{stage}"
                peace.mkdir()
                whole[stage] = peace, run_once(run, peace, None, draw)[0]
            folder = Path(name) / f"killed{turn}"
            folder.mkdir()
            outcome = case(run, folder, *whole[stage], min(KILLS_A_RUN, kills - total), draw)
            print(json.dumps(outcome), flush=True)
            total, turn = total + outcome["num_kills"], turn + 1


if __name__ == "__main__":
    main()
