"""What clipping costs a step under ZeRO: ours on partitions, against whole gradients collected the library's way, and none;
and what a reported step pays for knowing how far each part of the network moves.

Two processes over gloo on a CPU, or NCCL with a GPU each; a small network, so the share is that of a short step. The three
ways take turns on the same engine: the forward and backward passes before an update are the same for all.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import nfnet
import nfnet.optim.agc as agc
from benchmarks.turns import hardware
from nfnet.optim.param_groups import assign
from pipeline.distributed import World, join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig

NUM_RANKS, MICRO_BATCH, PIXELS, ROUNDS = 2, 16, 64, 9
TARGET = 0.02


def collect(engine: Engine, clipped: set[str]) -> None:
    """Whole gradients by the library's public functions, clipped as `nfnet.optim.agc` does, and written back."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad

    for name, parameter in engine.network.named_parameters():
        gradient, weight = safe_get_full_grad(parameter), safe_get_full_fp32_param(parameter)
        if name in clipped:
            shape = engine.shapes[name]
            gradient = gradient.view(shape)
            factors = agc.coefficients(agc.square_sums([weight.view(shape)]), agc.square_sums([gradient]), 0.01)
            value = (gradient * agc.per_unit(factors, [gradient])[0]).flatten()
            # Stage 3's setter cuts equal parts and fails where there is nothing left for the last rank.
            padding = -len(value) % NUM_RANKS if hasattr(parameter, "ds_id") else 0
            value = torch.nn.functional.pad(value, (0, padding)) if padding else value.view(shape)
            safe_set_full_grad(parameter, value)


def measure(stage: int, world: World) -> None:
    """Medians over turns of the time of an update, the slowest rank's, and of the passes before it."""
    torch.manual_seed(0)
    network = nfnet.create_model("nfnet_tiny", num_classes=10)
    clipped = {n for n, rule in assign(network.named_parameters()).items() if rule.clip}
    engine = Engine(
        network,
        optim=OptimConfig(learning_rate=0.1, ema_decay=0.999),
        config=EngineConfig(zero_stage=stage),  # type: ignore[arg-type]
        world=world,
        micro_batch=MICRO_BATCH,
        accumulation=1,
    )
    images = torch.randn(MICRO_BATCH, 3, PIXELS, PIXELS, device=world.device)
    labels = torch.randint(10, (MICRO_BATCH,), device=world.device)

    def collected() -> None:
        collect(engine, clipped)
        engine._apply(0.1)

    ways: dict[str, Callable[[], object]] = {
        "AGC on partitions (all of update)": lambda: engine.update(0.1),
        "no clipping (the library's step)": lambda: engine._apply(0.1),
        "AGC on partitions, each part's motion measured": lambda: engine.update(0.1, measure=True),
    }
    if stage:
        ways["AGC on collected gradients"] = collected
    times: dict[str, list[float]] = {name: [] for name in ("passes", *ways)}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            begin = _now(world)
            engine.forward_backward(images, labels, is_last=True)
            middle = _now(world)
            way()
            end = _now(world)
            if turn:
                times["passes"].append(middle - begin)
                times[name].append(end - middle)
    engine.close()
    if world.is_main:
        _print(stage, {name: statistics.median(found) for name, found in times.items()})


def _now(world: World) -> float:
    """When the last rank has come this far."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def _print(stage: int, medians: dict[str, float]) -> None:
    print(f"clipping under ZeRO stage {stage}, {NUM_RANKS} processes, nfnet_tiny at {PIXELS} px  [{hardware()}]")
    ours, none = list(medians.values())[1:3]
    for name, seconds in medians.items():
        print(f"  {name:48s} {seconds * 1e3:9.1f} ms")
    share = (ours - none) / (medians["passes"] + ours)
    verdict = "reached" if share <= TARGET else "missed"
    print(f"  share of the step: {share * 100:.1f} %; target {TARGET * 100:.0f} % {verdict}", end="")
    measured = medians["AGC on partitions, each part's motion measured"]
    print(f"; of a step that is reported {(measured - ours) / (medians['passes'] + measured) * 100:.1f} % more", end="")
    collected = medians.get("AGC on collected gradients")
    print(
        f"; collecting: {(collected - none) / (medians['passes'] + collected) * 100:.1f} %" if collected else "",
        flush=True,
    )


def main() -> None:
    if "RANK" not in os.environ:
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={NUM_RANKS}",
            "-m",
            "benchmarks.engine",
        ]
        subprocess.run([sys.executable, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return
    world = join()
    for stage in range(4):
        measure(stage, world)
    leave()


if __name__ == "__main__":
    main()
