"""Steps of a real engine, watched from outside: what reaches torch's process group, and how much memory the process takes.

argv: one JSON object: model, px, classes, stage, micro_batch, accumulation, precision, checkpointing, backend (gloo or fake),
world and rank (of the fake group), steps, file (of the gloo group's meeting). Prints one JSON object on rank 0.
"""

import gc
import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nfnet
from nfnet.variants import Variant
from pipeline.distributed import World
from pipeline.engine import parity_check
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "broadcast_": "broadcast",
    "barrier": "barrier",
}


class Collectives(TorchDispatchMode):
    """Every operation on torch's process group, as the dispatcher sees it: (kind, bytes of its largest side)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sides = [sum(t.nbytes for t in tree_leaves(a) if isinstance(t, torch.Tensor)) for a in args]
            self.rows.append((KINDS[func._opname], max(sides)))
        return func(*args, **(kwargs or {}))

    def sums(self) -> dict[str, list[int]]:
        """Kind -> [bytes, calls]."""
        found: dict[str, list[int]] = {}
        for kind, size in self.rows:
            entry = found.setdefault(kind, [0, 0])
            entry[0] += size
            entry[1] += 1
        return found


def resident(key: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, the most since `forget_peak`."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


def forget_peak() -> None:
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def network(name: str, classes: int) -> torch.nn.Module:
    if name == "parity":
        return nfnet.NFNet(parity_check.NETWORK, classes)
    if name == "heavy":  # few maps, many weights, among them some above DeepSpeed's limit of 100,000 elements
        return nfnet.NFNet(
            Variant(name="heavy", depths=(1, 2), widths=(512, 1024), strides=(2, 2), stem_widths=(32,), stem_strides=(2,),
                    group_width=128),
            classes,
        )  # fmt: skip
    return nfnet.create_model(name, num_classes=classes)


def main(asked: dict[str, Any]) -> dict[str, Any]:
    backend = asked.get("backend", "gloo")
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ.update(RANK=str(asked["rank"]), WORLD_SIZE=str(asked["world"]), LOCAL_RANK="0")
        dist.init_process_group("fake", store=FakeStore(), rank=asked["rank"], world_size=asked["world"])
    elif "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=0, device=torch.device("cpu"))
    accumulation, micro = asked.get("accumulation", 1), asked["micro_batch"]
    config = EngineConfig(
        zero_stage=asked["stage"],
        precision=asked.get("precision", "fp32"),
        activation_checkpointing=asked.get("checkpointing", 0) > 0,
        checkpointed_share=asked.get("checkpointing") or 1.0,
    )
    if backend == "gloo":  # libraries loaded, buffers of the group there: what remains is the run's own
        parity_check.check(config, world=world, accumulation=1)
    before = resident("VmRSS")
    optim = OptimConfig(learning_rate=0.1, ema_decay=0.9 if asked.get("averages", True) else None)
    with Collectives() as start:
        engine = Engine(
            network(asked["model"], asked["classes"]),
            optim=optim,
            config=config,
            world=world,
            micro_batch=micro,
            accumulation=accumulation,
        )
    steps, peaks = [], []
    for step in range(asked["steps"]):
        forget_peak()
        with Collectives() as seen:
            for i in range(accumulation):
                images = torch.randn(micro, 3, asked["px"], asked["px"]).to(memory_format=torch.channels_last)
                labels = torch.zeros(micro, dtype=torch.long)
                engine.forward_backward(images, labels, is_last=i == accumulation - 1)
            engine.update(0.1, measure=step % 2 == 1)
        steps.append(seen.sums())
        peaks.append(resident("VmHWM") - before)
    return {"start": start.sums(), "steps": steps, "peaks": peaks, "before": before}


if __name__ == "__main__":
    found = main(json.loads(sys.argv[1]))
    if dist.get_rank() == 0 or dist.get_backend() == "fake":
        print(json.dumps(found), flush=True)
    if dist.get_backend() != "fake":
        dist.barrier()
    dist.destroy_process_group()
