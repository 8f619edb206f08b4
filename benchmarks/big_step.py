"""One step of NFNet-F4+ (527M parameters) at 64 px in bf16 on a CPU, through the whole engine: how much memory it takes.

python -m benchmarks.big_step [MODEL [STAGE,STAGE,...]]      default: nfnet_f4_plus 0,1

Two updates, since the first makes the optimiser's state while the gradients are there and the second runs with all of it. Each
stage in a process of its own: the peak of a process never falls.
"""

import json
import os
import resource
import subprocess
import sys
import time

import torch

import nfnet
from benchmarks.turns import hardware
from pipeline.distributed import join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig

LIMIT_BYTES, PIXELS, BATCH, STEPS = 24e9, 64, 2, 2


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, stage: int) -> dict[str, float]:
    me = join()
    network = nfnet.create_model(name)
    num_parameters = sum(p.numel() for p in network.parameters())
    optim = OptimConfig(learning_rate=0.1, weight_decay=1e-6, ema_decay=0.99999)
    config = EngineConfig(precision="bf16", zero_stage=stage)  # type: ignore[arg-type]
    begin, at_start = time.perf_counter(), _peak_bytes()
    engine = Engine(network, optim=optim, config=config, world=me, micro_batch=BATCH, accumulation=1)
    made_s, made = time.perf_counter() - begin, _peak_bytes()
    seconds_s = 0.0
    for _ in range(STEPS):
        begin = time.perf_counter()
        engine.forward_backward(torch.randn(BATCH, 3, PIXELS, PIXELS), torch.arange(BATCH), is_last=True)
        stats = engine.update(0.1)
        seconds_s = time.perf_counter() - begin
        assert stats.applied and stats.gradient_norm > 0, stats
    engine.close()
    leave()
    return {
        "num_parameters": num_parameters,
        "start_bytes": at_start,
        "made_bytes": made,
        "peak_bytes": _peak_bytes(),
        "made_s": made_s,
        "step_s": seconds_s,
    }


def _table(name: str, stages: list[str]) -> None:
    print(f"{name} at {PIXELS} px, batch {BATCH}, bf16, {STEPS} updates with momentum and average  [{hardware()}]")
    for stage in stages:
        command = [sys.executable, "-m", "benchmarks.big_step", name, stage]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "BIG_STEP_ALONE": "1"}
        )
        found = json.loads(done.stdout.splitlines()[-1])
        peak, weights = found["peak_bytes"], 4 * found["num_parameters"]
        verdict = "reached" if peak <= LIMIT_BYTES else "missed"
        print(
            f"  stage {stage}: peak {peak / 1e9:5.2f} GB = {peak / weights:.1f} times the fp32 weights "
            f"({weights / 1e9:.2f} GB); engine made {found['made_bytes'] / 1e9:.2f} GB; second step {found['step_s']:.1f} s; "
            f"limit {LIMIT_BYTES / 1e9:.0f} GB {verdict}",
            flush=True,
        )


def main() -> None:
    _table("nfnet_f4_plus", ["0", "1"])


if __name__ == "__main__":
    name, stages = (sys.argv[1:] + ["nfnet_f4_plus", "0,1"][len(sys.argv) - 1 :])[:2]
    if "BIG_STEP_ALONE" in os.environ:
        print(json.dumps(measure(name, int(stages))))
    else:
        _table(name, stages.split(","))
