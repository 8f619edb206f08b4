"""The fuzzing harness itself: what breaks a limit is found, what does not is not."""

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.fuzzing import fuzz, mutants

CANARY = Path(__file__)


def ok(_):
    pass


def refuse(_):
    raise UserError("no")


def crash(data):
    raise IndexError("x")


def spin(_):
    try:
        while True:
            pass
    except Exception:  # a reader's own handler must not end it
        pass


def grow(_):
    return bytearray(600_000_000)


def die(_):
    os._exit(3)


def write_outside(_):
    (CANARY.parent / "never").open("w")


def read_private(_):
    CANARY.read_bytes()


def start(_):
    subprocess.Popen(["true"])


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (crash, "IndexError"),
        (spin, "more than 1 s"),
        (grow, "MemoryError"),
        (die, "died with 3"),
        (write_outside, "opened for writing"),
        (read_private, "was read"),
        (start, "subprocess.Popen"),
    ],
)
def test_what_breaks_a_limit_fails(tmp_path, wrong, what):
    def read(data):
        if data == b"bad":
            wrong(data)

    try:
        with pytest.raises(AssertionError, match=what):
            fuzz(read, [b"good", b"bad"], tmp_path / "in", private=CANARY.parent)
    finally:
        (CANARY.parent / "never").unlink(missing_ok=True)
    assert (tmp_path / "in" / "failed").read_bytes() == b"bad"


def test_what_keeps_the_limits_is_counted(tmp_path):
    assert fuzz(ok, [b"1", b"2"], tmp_path) == {"read": 2}
    assert fuzz(refuse, [b"1", b"2"], tmp_path) == {"refused": 2}
    assert list(tmp_path.iterdir()) == []


def test_mutants_are_a_function_of_the_seed():
    first = list(mutants([b"abc" * 100, b"xyz"], 50))
    assert first == list(mutants([b"abc" * 100, b"xyz"], 50)) != list(mutants([b"abc" * 100, b"xyz"], 50, seed=1))
    assert len(set(first)) > 40
