"""A checkpoint knows neither ranks nor stage; each rank reads its own part, once; a killed run ends as one that was not."""

import json
import os

import pytest

from tests.pipeline import processes

KILLS = int(os.environ.get("NORMFREE_TEST_KILLS", "50"))
"""Of the slow test; it is stated for 50, and fewer are for trying it."""


def same_everywhere(ranks: list[int], stages: list[int]) -> None:
    lines = processes.run("reshard.py", 4, 2, ranks, stages, timeout_s=900).splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["ranks"] for line in found] == ranks
    for line in found:
        assert [int(s) for s in line["stages"]] == stages
        for outcome in line["stages"].values():
            assert outcome["kinds"] == ["ema", "momentum", "weights"]
            assert outcome["identical"] and outcome["num_updates"] == 4, line  # 3 saved, and the one after loading
            assert outcome["distance_then"] < 1e-6 < 1e-4 < outcome["moved"], line
            # Every file is verified by one rank, and every rank reads what it holds and no more: at stage 0 everything.
            assert sum(outcome["hashed_bytes"]) == outcome["checkpoint_bytes"], line
            assert all(read == held for read, held in outcome["read_and_held_bytes"]), line
            # None hears of what others hold: with that the traffic of a start would grow with the square of the ranks.
            assert all(heard == read > 0 for heard, read in outcome["heard_and_read_parts"]), line


def test_saved_by_4_ranks_at_stage_2_it_is_identical_at_1_and_3_ranks_and_stages_0_1_3() -> None:
    same_everywhere([1, 3], [0, 1, 3])


@pytest.mark.slow
def test_saved_by_4_ranks_at_stage_2_it_is_identical_at_1_2_4_and_8_ranks_and_stages_0_to_3() -> None:
    same_everywhere([1, 2, 4, 8], [0, 1, 2, 3])


def killed_and_whole(digits: str, kills: int, stages: list[int], seed: int = 0) -> None:
    lines = processes.run("random_kills.py", digits, kills, stages, seed, timeout_s=3600).splitlines()
    found = [json.loads(line) for line in lines]
    assert sum(line["num_kills"] for line in found) >= kills
    for line in found:
        assert line["differs"] == [] and line["step"] == 20, line


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_bit_for_bit_as_if_left_alone(digits: str) -> None:
    """Weights, momentum, averages, losses, norms, rates and the pixels and keys of every sample; all stages, two ranks."""
    killed_and_whole(digits, KILLS, [0, 1, 2, 3])
