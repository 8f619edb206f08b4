"""SIGKILL at every instrumented point of a save, on each of two ranks: the next start finds a checkpoint that verifies."""

import json

import pytest

from pipeline.supervision import fault_points
from tests.pipeline import processes

OF_EACH_FILE = ("file opened", "file piece", "file written", "file named", "named fragments", "upload", "uploaded")
MAIN_ONLY = ("commit", "named commit.json", "committed", "retention", "commit deleted", "files deleted")
STANDS_AFTER = ("committed", "retention", "commit deleted", "files deleted")
POINTS = [*fault_points.POINTS, "named fragments", "named part", "named commit.json"]
CASES = [
    (point, call, rank)
    for point in POINTS
    for rank in ((0,) if point in MAIN_ONLY else (0, 1))
    for call in ((1, 2) if point in OF_EACH_FILE else (1,))
]


def holds(cases: list[tuple[str, int, int]]) -> None:
    lines = processes.run("save_kills.py", cases).splitlines()
    assert len(lines) == len(cases)
    for line in map(json.loads, lines):
        point, _, rank = line["case"]
        assert line["was_killed"], line
        assert line["found"] in (2, 3) and line["is_equal"] and line["num_passed_over"] == 0, line
        if point in STANDS_AFTER or (point == "saved" and rank == 0):
            assert line["found"] == 3, line
        assert line["found_then"] == 3 and line["folders_then"] == 1, line  # no leftover stays for ever


def test_killed_at_a_point_of_each_kind_nothing_is_lost_but_the_save() -> None:
    holds([("file piece", 1, 1), ("part", 1, 0), ("named part", 1, 1), ("commit", 1, 0), ("commit deleted", 1, 0)])


@pytest.mark.slow
def test_killed_at_every_point_on_each_rank_nothing_is_lost_but_the_save() -> None:
    holds(CASES)
