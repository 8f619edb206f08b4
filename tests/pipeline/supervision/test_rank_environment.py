"""One place says who a process is: all of a launcher's variables, none, or a sentence."""

import re
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.supervision.rank_environment import RANK_VARIABLES, is_alone, is_main, place

ROOT = Path(__file__).parents[3]
WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_all_of_a_launchers_variables_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, WHOLE)
    here = place()
    assert (here.rank, here.size, here.local_rank, here.is_main, is_main(), is_alone()) == (
        1,
        4,
        1,
        False,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({}, ""),
        ({"RANK": ""}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ""),
        ({"RANK": "1"}, "RANK set"),
        ({"LOCAL_RANK": "3", "RANK": "3", "MASTER_ADDR": "node0"}, "RANK and LOCAL_RANK set"),
        ({"RANK": "junk", "WORLD_SIZE": "1"}, "RANK set"),
    ],
)
def test_without_a_world_a_process_is_alone_and_says_what_it_overlooks(
    variables: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, variables)
    here = place()
    assert (here.rank, here.size, here.local_rank) == (0, 1, 0) and here.overlooked.startswith(word)
    assert bool(here.overlooked) == bool(word)


@pytest.mark.parametrize(
    "changes",
    [
        {"MASTER_ADDR": ""},
        {"RANK": ""},
        {"LOCAL_RANK": ""},
        {"WORLD_SIZE": "four"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-2"},
        {"WORLD_SIZE": "2.0"},
        {"WORLD_SIZE": "\u0664"},
        {"RANK": "4"},
        {"RANK": "0", "LOCAL_RANK": "2"},
        {"MASTER_PORT": "http"},
        {"MASTER_PORT": "99999"},
    ],
)
def test_a_part_of_them_or_nonsense_is_a_sentence(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, {**WHOLE, **changes})
    with pytest.raises(UserError, match="unset"):
        place()
    assert is_main() and is_alone()


def test_nobody_else_reads_them() -> None:
    reads = re.compile(r"environ(\.get\(|\[)\"(RANK|WORLD_SIZE|LOCAL_RANK)\"(?!\] = )")
    readers = {
        str(path.relative_to(ROOT))
        for floor in ("pipeline", "transfer", "orchestration")
        for path in (ROOT / floor).rglob("*.py")
        if reads.search(path.read_text())
    }
    assert readers == {"pipeline/distributed.py"}  # the place of a process that has joined already
