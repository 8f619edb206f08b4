"""The foretold memory of a step against the peak of real runs.

Measured: two processes on gloo train on noise; the most resident memory of rank 0 (VmHWM, set back before each step through
/proc/self/clear_refs) less what it held before its network was made, when libraries were loaded, the group stood and a
tiny network had been trained. malloc returns what is freed (MALLOC_MMAP_THRESHOLD_), so that the peak is what was held at a time.
"""

import json
from functools import lru_cache
from typing import Any

import pytest
import torch

from nfnet.analysis.step_profile import StepProfile, step_profile
from pipeline.fitting.memory import memory
from pipeline.fitting.parameters import Parameters
from pipeline.planning.assumptions import assumptions
from pipeline.planning.devices import DEVICES
from tests.pipeline import processes
from tests.pipeline.programs.planned_steps import network

RUNS: dict[str, dict[str, Any]] = {
    "many weights": {"model": "nf_resnet50", "px": 64, "micro_batch": 8},
    "many maps": {"model": "nf_regnet_b1", "px": 160, "micro_batch": 12},
    "accumulated": {"model": "heavy", "px": 32, "micro_batch": 48, "accumulation": 2},
    "bf16, checkpointed": {
        "model": "nf_resnet50",
        "px": 96,
        "micro_batch": 8,
        "precision": "bf16",
        "checkpointing": 1,
    },
    "half checkpointed": {"model": "nf_resnet50", "px": 128, "micro_batch": 8, "checkpointing": 0.5},
}


@lru_cache
def profile(name: str) -> tuple[Parameters, StepProfile]:
    asked = RUNS[name]
    with torch.device("meta"):
        model = network(asked["model"], 1000)
    checkpointing = asked.get("checkpointing", 0)
    found = step_profile(model, asked["px"], precision=asked.get("precision", "fp32"), checkpointing=checkpointing)
    return Parameters.of(model), found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_memory_is_within_a_tenth_of_what_a_run_takes(name: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    asked = {**RUNS[name], "classes": 1000, "stage": stage, "steps": 3}
    out = processes.run("planned_steps.py", asked, num_processes=2, timeout_s=1200)
    measured = max(json.loads(out.strip().splitlines()[-1])["peaks"])
    parameters, passes = profile(name)
    held = memory(
        parameters,
        passes,
        stage=stage,
        world=2,
        micro_batch=asked["micro_batch"],
        accumulation=asked.get("accumulation", 1),
        averages=True,
        is_cpu=True,
    )
    known = assumptions(DEVICES["cpu"])
    foretold = held.total * (1 + known["fragmentation"].value) + 1e9 * known["workspace_gb"].value
    print(
        f"{name}, stage {stage}: measured {measured / 2**20:.0f} MiB, foretold {foretold / 2**20:.0f} ({held.moment})"
    )
    assert measured == pytest.approx(foretold, rel=0.1), (held, measured)
