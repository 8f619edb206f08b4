"""Run by test_engine.py in one or several processes: steps of the engine on fixed batches, several cases a group of
processes; rank 0 writes the outcomes."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nfnet
from nfnet.variants import Variant
from pipeline.checkpoint.load import Piece
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.batches import Batch
from pipeline.distributed import World, join, leave
from pipeline.engine import deepspeed_engine
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.supervision.process_exit import end
from pipeline.training.evaluate import evaluate

GLOBAL_BATCH, STEPS = 8, 10
SMALL = Variant(
    name="small",
    depths=(1, 2),
    widths=(24, 40),
    strides=(1, 2),
    stem_widths=(5, 9),
    stem_strides=(2, 1),
    group_width=10,
    final_width=48,
)
"""Odd widths: partitions cut through units, at any number of ranks."""

library_config = deepspeed_engine.deepspeed_config


def nothing_stays_gathered(*args: Any, **options: Any) -> dict[str, Any]:
    """In stage 3 the library keeps small parameters whole on every rank: here none, as in a large network."""
    config = library_config(*args, **options)
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
    return images, torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator)


def network() -> nfnet.NFNet:
    torch.manual_seed(0)
    return nfnet.NFNet(SMALL, 10)


def make(me: World, options: dict[str, Any]) -> Engine:
    return Engine(
        network(),
        optim=OptimConfig(
            learning_rate=0.1,
            weight_decay=1e-3,
            ema_decay=0.9,
            head_learning_rate_scale=0.5,
            sam_rho=options.get("sam_rho", 0.0),
            sam_share=1.0,
        ),
        config=EngineConfig(
            zero_stage=options["stage"],
            precision=options.get("precision", "fp32"),
            activation_checkpointing=options.get("activation_checkpointing", False),
        ),
        world=me,
        micro_batch=GLOBAL_BATCH // me.size // options["accumulation"],
        accumulation=options["accumulation"],
    )


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{k}/{n}": t for k in ("weights", "momentum", "ema") for n, t in engine.gather(k).items()}


def train(me: World, engine: Engine, options: dict[str, Any], steps: range) -> list[dict[str, Any]]:
    stats = []
    for step in steps:
        images, labels = batch(step)
        if step == options.get("poison_step") and me.rank == me.size - 1:
            images[-1] = float("nan")  # lies in the last rank's last micro-batch
        share = GLOBAL_BATCH // options["accumulation"]
        for i, (x, y) in enumerate(zip(images.split(share), labels.split(share), strict=True)):
            n = len(x) // me.size
            mine = slice(me.rank * n, (me.rank + 1) * n)
            engine.forward_backward(x[mine], y[mine], is_last=i == options["accumulation"] - 1)
        stats.append(dataclasses.asdict(engine.update(0.1, measure=bool(step % 2))))
    return stats


class Reductions(TorchDispatchMode):
    """The types of all numbers that ranks add up or scatter, whichever library asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func._schema.name:
            self.types |= {str(t.dtype) for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        return func(*args, **(kwargs or {}))


class ThreeImages:
    """A split that two ranks, or four, cannot share evenly."""

    split, num_samples, label_table = "val", 3, None

    def batches(self, batch_size: int, *, rank: int = 0, num_ranks: int = 1, pin: bool = False) -> Iterator[Any]:
        images = torch.arange(3 * 3 * 16 * 16).remainder(251).to(torch.uint8).view(3, 16, 16, 3)
        for i in range(rank, 3, num_ranks):
            yield Batch(images[i : i + 1], torch.tensor([i]), torch.tensor([i]))


def case(me: World, options: dict[str, Any]) -> dict[str, Any]:
    """Ten steps; an evaluation in their middle must change nothing."""
    engine = make(me, options)
    stats = train(me, engine, options, range(STEPS // 2))
    with engine.evaluation_network() as (evaluated, kind), torch.no_grad():
        logits = evaluated(batch(0)[0])
        share = evaluate(
            evaluated,
            ThreeImages(),
            AugmentConfig(),
            world=me,
            batch_size=1,
            step=0,
            weights=kind,  # type: ignore[arg-type]
        )
    half = engine.gather("ema")
    with Reductions() as reductions:
        stats += train(me, engine, options, range(STEPS // 2, STEPS))
    outcome = {
        "reduced": sorted(reductions.types),
        "state": state_of(engine),
        "stats": stats,
        "logits": logits,
        "loss": share.loss,
        "kind": kind,
        "half": half,
    }
    held = torch.tensor(float(sum(t.numel() for t in engine.local_fragments().values())))
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    outcome["held"] = held.item()
    if "restore" in options:
        outcome["restored"] = restored(me, engine, options)
    engine.close()
    return outcome


def restored(me: World, engine: Engine, options: dict[str, Any]) -> dict[str, Any]:
    """What each rank would save, put together, loaded at other stages."""
    everyone: list[Any] = [None] * me.size
    mine = {key: part.contiguous() for key, part in engine.local_fragments().items()}
    dist.all_gather_object(everyone, save(mine))  # ranks' objects are data, and tensors are none (pipeline.exchange)
    whole = {
        k: {n: torch.full(s, float("nan")) for n, s in engine.shapes.items()} for k in ("weights", "momentum", "ema")
    }
    for fragments in everyone:
        for key, part in load(fragments).items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.partition("@")
            whole[kind][name].view(-1)[int(start) : int(start) + part.numel()] = part.view(-1)
    found = {}
    for stage in options["restore"]:
        other = make(me, {**options, "stage": stage})
        other.restore(list(whole), lambda pieces: copy(whole, pieces), engine.num_updates)
        state = state_of(other)
        train(me, other, {**options, "poison_step": None}, range(STEPS, STEPS + 1))
        found[stage] = {"state": state, "next": state_of(other)}
        other.close()
    return found


def copy(whole: dict[str, dict[str, torch.Tensor]], pieces: list[Piece]) -> None:
    for kind, name, start, values in pieces:
        values.copy_(whole[kind][name].view(-1)[start : start + values.numel()])


def main() -> None:
    out, cases = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    deepspeed_engine.deepspeed_config = nothing_stays_gathered
    me = join()
    outcomes = {name: case(me, options) for name, options in cases.items()}
    if me.is_main:
        torch.save(outcomes, out)
    leave()


if __name__ == "__main__":
    main()
    end(0)
