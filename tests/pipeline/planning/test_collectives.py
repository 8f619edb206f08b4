"""Foretold collectives are those that reach torch's process group, to the byte."""

import json
from collections import Counter
from functools import lru_cache
from typing import Any

import pytest

from pipeline.fitting.parameters import ELEMENT, Parameters
from pipeline.planning.collectives import step_collectives
from tests.pipeline import processes
from tests.pipeline.programs.planned_steps import network

ASKED = {"model": "heavy", "px": 16, "classes": 10, "micro_batch": 1, "steps": 4}


@lru_cache
def parameters() -> Parameters:
    return Parameters.of(network("heavy", 10))


@lru_cache
def steps(**asked: Any) -> dict[str, Any]:
    world = asked.pop("processes", 1)
    out = processes.run("planned_steps.py", {**ASKED, **asked}, num_processes=world, timeout_s=600)
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def agree(found: dict[str, Any], *, stage: int, world: int, accumulation: int) -> None:
    """From the third step on: the first of stage 3 learns the order of its modules, and its second still sends more."""
    start = {"broadcast": (2 if stage == 3 else 1) * parameters().num_bytes}  # every weight from rank 0
    start |= {"all_gather": parameters().padded(world)} if stage == 3 else {}
    assert {k: v[0] for k, v in found["start"].items() if k != "barrier"} == start
    planned = step_collectives(parameters(), stage=stage, world=world, accumulation=accumulation)
    for number in (2, 3):
        seen = found["steps"][number]
        expected: Counter[str] = Counter()
        for c in planned:
            expected[c.kind] += c.total_bytes
        if number % 2 == 1 and stage > 0:  # a step that is reported measures its update: six sums a unit and not two
            expected["all_reduce"] += 4 * ELEMENT * parameters().num_units
        assert {k: v[0] for k, v in seen.items()} == expected
        if stage < 3:  # stage 3 sends several layers' weights together, as they come
            assert sum(v[1] for v in seen.values()) == sum(c.calls for c in planned)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_real_ranks_send_what_was_foretold(stage: int, accumulation: int) -> None:
    agree(steps(stage=stage, accumulation=accumulation, processes=2), stage=stage, world=2, accumulation=accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("world", [64, 512, 4096])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_of_thousands_sends_what_was_foretold(stage: int, world: int) -> None:
    """On torch's fake process group: everything of the engine and DeepSpeed runs, nothing is sent."""
    rank = 0 if stage == 3 else world // 3  # stage 3 compares what rank 0 has broadcast, which nobody does here
    found = steps(stage=stage, accumulation=2, backend="fake", world=world, rank=rank)
    agree(found, stage=stage, world=world, accumulation=2)


def test_a_rank_of_64_sends_what_was_foretold() -> None:
    agree(steps(stage=2, accumulation=2, backend="fake", world=64, rank=1), stage=2, world=64, accumulation=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_sends_hardly_more_on_more_ranks(stage: int) -> None:
    """But for padding to a multiple of the ranks, which is less than a few elements a rank and parameter."""
    few, many = (
        sum(c.total_bytes for c in step_collectives(parameters(), stage=stage, world=world, accumulation=1))
        for world in (2, 4096)
    )
    assert few <= many <= few + 4 * 4096 * 3 * len(parameters().each)
