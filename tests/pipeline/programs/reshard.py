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
import safetensors
import torch

from pipeline.checkpoint import load as load_module
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.distributed import World, gather
from pipeline.engine import deepspeed_engine
from pipeline.engine.engine import Engine, EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.records import Saved
from pipeline.storage import content_cache, objects

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


class Counted:
    """Bytes of checkpoints that this process reads: hashed, and taken out of safetensors files; parts that it hears of, and
    parts that it reads."""

    hashed_bytes = read_bytes = num_heard = num_read = 0

    def __enter__(self) -> "Counted":
        self._kept = objects.sha256_file, safetensors.safe_open, load_module.ask_main
        content_cache._verified.clear()  # another stage's start would have hashed them already

        def sha256_file(path: Path) -> str:
            self.hashed_bytes += Path(path).stat().st_size
            return self._kept[0](path)

        def ask_main(*args: Any) -> Any:
            answer = self._kept[2](*args)
            self.num_heard += len(answer)
            return answer

        objects.sha256_file, safetensors.safe_open = sha256_file, lambda path, framework: _File(self, path)  # type: ignore[assignment]
        load_module.ask_main = ask_main
        return self

    def __exit__(self, *error: object) -> None:
        objects.sha256_file, safetensors.safe_open, load_module.ask_main = self._kept  # type: ignore[misc]


class _File:
    def __init__(self, counted: Counted, path: Path) -> None:
        self._file, self._counted = counted._kept[1](path, framework="pt"), counted

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_slice(self, key: str) -> "_Slice":
        return _Slice(self._counted, self._file.get_slice(key))


class _Slice:
    def __init__(self, counted: Counted, entry: Any) -> None:
        self._counted, self._entry = counted, entry
        self.get_shape, self.get_dtype = entry.get_shape, entry.get_dtype

    def __getitem__(self, wanted: slice) -> torch.Tensor:
        found = self._entry[wanted]
        self._counted.read_bytes += found.numel() * found.element_size()
        self._counted.num_read += 1
        return found


def load(me: World, folder: Path, stages: list[int]) -> None:
    """For each stage: what the ranks hold after loading, against what was held; and after one more step."""
    truth = torch.load(folder / "held.pt")
    found = {}
    for stage in stages:
        engine = make(me, stage)
        with Counted() as counted:
            commit, _ = load_module.newest(str(folder), "", me)
            assert commit is not None
            engine.restore(
                commit.kinds, lambda pieces, c=commit: load_module.fill(c, "", pieces, me), commit.num_updates
            )
        held_bytes = 4 * sum(view.numel() for kind in engine.kinds for _, view in engine._views(kind))
        reads = gather(me, counted.hashed_bytes), gather(me, [counted.read_bytes, held_bytes])
        parts = gather(me, [counted.num_heard, counted.num_read])
        held = steps.state_of(engine)
        train(me, engine, STEPS)
        then = steps.state_of(engine)
        found[stage] = {
            "kinds": sorted({k.split("/")[0] for k in held}),
            "identical": set(held) == set(truth["held"])
            and all(torch.equal(held[k], v) for k, v in truth["held"].items()),
            "num_updates": engine.num_updates,
            "distance_then": max(float((then[k] - v).abs().max()) for k, v in truth["then"].items()),
            "hashed_bytes": reads[0],
            "read_and_held_bytes": reads[1],
            "heard_and_read_parts": parts,
            "checkpoint_bytes": commit.size_bytes,
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
