"""Run by test_reshard.py: a checkpoint of some ranks and one stage, loaded by other numbers of ranks at other stages.

Prints one JSON object a number of ranks.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_steps as steps  # next to this file, whose folder is the program's
import forked
import torch

from pipeline.checkpoint import load as load_module
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.distributed import World
from pipeline.engine import deepspeed_engine
from pipeline.engine.engine import Engine, EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.records import Saved

GLOBAL_BATCH, STEPS = 24, 3  # divides over 1, 2, 3, 4 and 8 ranks
FACTS: dict[str, Any] = {"samples": STEPS * GLOBAL_BATCH, "num_updates": STEPS, "config": {}, "config_digest": ""}
FACTS |= {"dataset": {}, "classes": [], "evaluation": {}}


def make(me: World, stage: int) -> Engine:
    return Engine(
        steps.network(),
        optim=OptimConfig(learning_rate=0.1, weight_decay=1e-3, ema_decay=0.9),
        config=EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
        world=me,
        micro_batch=GLOBAL_BATCH // me.size,
        accumulation=1,
    )


def train(me: World, engine: Engine, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator)
    share = GLOBAL_BATCH // me.size
    mine = slice(me.rank * share, (me.rank + 1) * share)
    engine.forward_backward(images[mine], labels[mine], is_last=True)
    engine.update(0.1)


def save(me: World, folder: Path, stage: int) -> None:
    """Steps, and a save as a run makes it; what the ranks held, gathered, next to it."""
    engine = make(me, stage)
    for step in range(STEPS):
        train(me, engine, step)
    held = steps.state_of(engine)
    facts = FACTS | {"shapes": {n: list(s) for n, s in engine.shapes.items()}}
    with Saver(str(folder), config=SavingConfig(), policy=Policy(last=1), world=me, taken=set()) as saver:
        records = saver.save(step=STEPS, fragments=engine.local_fragments(), facts=facts, final=True)
    train(me, engine, STEPS)
    then = steps.state_of(engine)
    if me.is_main:
        assert any(isinstance(r, Saved) for r in records), records
        torch.save({"held": held, "then": then}, folder / "held.pt")
    engine.close()


def load(me: World, folder: Path, stages: list[int]) -> None:
    """For each stage: what the ranks hold after loading, against what was held; and after one more step."""
    truth = torch.load(folder / "held.pt")
    commit = load_module.resolve(str(folder), str(folder / f"cache{me.rank}"))
    found = {}
    for stage in stages:
        engine = make(me, stage)
        engine.restore(load_module.load_state(commit, str(folder / "cache")), commit.num_updates)
        held = steps.state_of(engine)
        train(me, engine, STEPS)
        then = steps.state_of(engine)
        found[stage] = {
            "kinds": sorted({k.split("/")[0] for k in held}),
            "identical": set(held) == set(truth["held"])
            and all(torch.equal(held[k], v) for k, v in truth["held"].items()),
            "num_updates": engine.num_updates,
            "distance_then": max(float((then[k] - v).abs().max()) for k, v in truth["then"].items()),
            "moved": max(float((then[k] - v).abs().max()) for k, v in truth["held"].items()),
        }
        engine.close()
    if me.is_main:
        (folder / "found.json").write_text(json.dumps(found))


def in_ranks(size: int, work: Callable[[World], None]) -> None:
    codes = forked.wait(forked.start(size, work))
    assert codes == [0] * size, f"{size} ranks ended with {codes}"


def main() -> None:
    saved_ranks, saved_stage, sizes, stages = (json.loads(word) for word in sys.argv[1:5])
    forked.prepare()
    deepspeed_engine.deepspeed_config = steps.nothing_stays_gathered
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_ranks(saved_ranks, lambda me: save(me, folder, saved_stage))
        for size in sizes:
            in_ranks(size, lambda me: load(me, folder, stages))
            print(json.dumps({"ranks": size, "stages": json.loads((folder / "found.json").read_text())}), flush=True)


if __name__ == "__main__":
    main()
