"""Durations: what is read, what is refused, how many steps they are."""

import math

import pytest

from pipeline.duration import Duration
from pipeline.errors import UserError


def test_what_is_written_is_read_again() -> None:
    for duration in (
        Duration(20, "epochs"),
        Duration(1e6, "samples"),
        Duration(0.1 + 0.2, "epochs"),
        Duration(0, "steps"),
    ):
        assert Duration.parse(str(duration)) == duration or math.isclose(duration.value, 0.3)
    assert Duration.parse(" 1.5e+3sample ") == Duration(1500, "samples")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_duration_is_finite_and_not_below_zero(value: float) -> None:
    with pytest.raises(UserError, match="give a number of 0 or more"):
        Duration(value, "steps")


@pytest.mark.parametrize("text", ["5", "e steps", "5 weeks", "-5 steps", "5 stepss", "", None])
def test_what_is_no_duration_is_refused_with_its_place(text: object) -> None:
    with pytest.raises(UserError, match=r"^duration is .*; write a number and a unit"):
        Duration.parse(text)
    with pytest.raises(UserError, match=r"^eval_every is "):
        Duration.parse(text, "eval_every")


def test_steps_are_the_nearest_number_and_one_at_least_but_none_of_nothing() -> None:
    def steps(value: float, unit: str) -> int:
        return Duration(value, unit).steps(samples_per_epoch=1000, global_batch=100)  # type: ignore[arg-type]

    assert [steps(v, "samples") for v in (0, 1, 149, 151, 1000)] == [0, 1, 1, 2, 10]
    assert [steps(v, "epochs") for v in (0, 0.001, 1.26)] == [0, 1, 13] and [steps(v, "steps") for v in (0, 3)] == [
        0,
        3,
    ]
