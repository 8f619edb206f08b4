"""Profiled steps of the loop: what is found, and that it changes nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.loading.datasets import DataConfig
from pipeline.distributed import leave
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.errors import UserError
from pipeline.profiling import profiler, ranges
from pipeline.profiling.asked import parse
from pipeline.records import Notice, Profiled, Record
from pipeline.training.run import Run
from pipeline.training.train import train
from tests.pipeline.training.test_train import make_run, start, state


def short(digits: str, stage: int = 0, steps: int = 6) -> Run:
    engine = EngineConfig(zero_stage=stage, parity_check=False)  # type: ignore[arg-type]
    data = DataConfig(url=digits, mix_blocks=4, block_mb=0.01, eval_split=None)
    return make_run(digits, data=data, engine=engine, duration=Duration(steps, "steps"), save_every=None)


def records_of(run: Run, out: Path, profile: str) -> list[Record]:
    try:
        return [*train(run, str(out / "run"), profile=parse(profile))]
    finally:
        leave()


def test_without_a_profile_a_range_is_nothing() -> None:
    assert ranges.span("forward") is ranges.span("backward")
    with ranges.spans_on():
        assert isinstance(ranges.span("forward"), torch.profiler.record_function)
    assert ranges.span("forward") is ranges.span("backward")


@pytest.mark.parametrize(
    ("stage", "num_processes"),
    [(0, 1), *(pytest.param(stage, 2, marks=pytest.mark.slow) for stage in (0, 1, 2, 3))],
)
def test_profiled_ranks_train_the_same_weights_bit_for_bit_and_the_trace_names_our_phases(
    stage: int, num_processes: int, digits: str, tmp_path: Path
) -> None:
    found: dict[str, Any] = {}
    for name in ("plain", "profiled"):
        options = {"profile": "2:4"} if name == "profiled" else {}
        run = short(digits, stage)
        if num_processes == 1:
            records = [r.as_dict() for r in records_of(run, tmp_path / name, options.get("profile", ""))]
        else:
            records = start(run, tmp_path / name, options, num_processes=num_processes)
        found = {r["kind"]: r for r in records}
        assert ("Profiled" in found) == (name == "profiled")
    plain, profiled = (state(tmp_path / name)[0] for name in ("plain", "profiled"))
    assert plain.keys() == profiled.keys() and all(torch.equal(plain[k], profiled[k]) for k in plain)
    record = found["Profiled"]
    assert (record["step"], record["first"], record["last"]) == (4, 2, 4) and len(record["operations"]) == 10
    calls = {row["name"]: row["calls"] for row in record["phases"]}
    share = sum(row["host_share"] for row in record["phases"])
    num = 2 // num_processes  # micro-batches of eight, sixteen images a step
    assert [calls[n] for n in ("data", "transfer", "forward", "backward", "update")] == [num, num, num, num, 1]
    assert min(calls[n] for n in ("reduce", "clip", "records")) >= 1 and abs(share - 1) < 1e-6
    with gzip.open(record["url"]) as file:
        events = json.load(file)["traceEvents"]
    steps = {e["name"] for e in events if e["name"].startswith("ProfilerStep#")}
    assert len(steps) == 3
    assert sum(e["name"] == "phase: forward" and e.get("cat") == "user_annotation" for e in events) == 3 * num


def test_on_a_resume_what_is_left_is_profiled_and_a_trace_that_is_too_large_is_said(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = records_of(short(digits, steps=4), tmp_path, "3:4")
    second = records_of(short(digits, steps=7), tmp_path, "2:4")
    monkeypatch.setattr(profiler, "MAX_BYTES", 1000)
    third = records_of(short(digits, steps=9), tmp_path, "2:8")
    assert [(r.first, r.last) for r in first if isinstance(r, Profiled)] == [(3, 4)]
    assert not any(isinstance(r, Profiled) for r in second)
    assert ["done already" in r.text for r in second if isinstance(r, Notice)] == [True]
    assert [(r.first, r.last, r.url) for r in third if isinstance(r, Profiled)] == [(8, 8, "")]
    assert ["more than 1,000" in r.text for r in third if isinstance(r, Notice)] == [True]
    assert [p.name for p in (tmp_path / "run" / "profiles").iterdir()] == ["steps-3-4.json.gz"]


def test_steps_that_the_run_never_reaches_are_refused_before_it_starts(digits: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="asks for step 7, and the run has 6"):
        records_of(short(digits), tmp_path, "5:7")
    assert not (tmp_path / "run" / "run.yaml").exists()
