"""Ranges, units and forms that a field's type carries."""

from typing import Any

import pytest

from pipeline.configuration import convert
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.field_types import (
    GIGABYTES,
    MEGABYTES,
    SECONDS,
    Count,
    CountOrZero,
    Form,
    Items,
    NonNegative,
    Positive,
    PositiveDuration,
    Range,
    Seconds,
    Share,
    ShareBelowOne,
    Text,
)


@pytest.mark.parametrize(
    ("bounds", "inside", "words"),
    [
        (Range(1), (1, 2, 3, 9), "of 1 or more"),
        (Range(1, without="low"), (2, 3, 9), "above 1"),
        (Range(high=3), (0, 1, 2, 3), "of at most 3"),
        (Range(high=3, without="high"), (0, 1, 2), "below 3"),
        (Range(1, 3), (1, 2, 3), "from 1 to 3"),
        (Range(1, 3, without="low"), (2, 3), "above 1 and at most 3"),
        (Range(1, 3, without="high"), (1, 2), "from 1 to below 3"),
        (Range(1, 3, without="both"), (2,), "above 1 and below 3"),
        (Range(1000), (), "of 1,000 or more"),
    ],
)
def test_a_range_holds_what_its_words_say(bounds: Range, inside: tuple[int, ...], words: str) -> None:
    assert tuple(n for n in (0, 1, 2, 3, 9) if bounds.holds(n)) == inside and bounds.words() == words
    assert tuple(n for n in (0, 1, 2, 3, 9) if bounds.holds(Duration(n, "steps"))) == inside


def test_units_count_in_the_fields_own() -> None:
    sizes = {"ms": 1e-3, "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}
    assert {word: SECONDS.factor(word) for word in sizes} == sizes
    assert SECONDS.factor("Hours") == 3600 and SECONDS.factor("week") is None
    for power, word in enumerate("kMGT", 1):
        assert MEGABYTES.factor(f"{word}B") == 1000**power / 1e6
        assert GIGABYTES.factor(f"{word}iB" if word != "k" else "KiB") == 1024**power / 1e9
    assert MEGABYTES.factor("bytes") == MEGABYTES.factor("B") == 1e-6
    assert (SECONDS.name, MEGABYTES.name, GIGABYTES.name) == ("seconds", "MB", "GB")


def test_a_list_holds_so_many_items_and_none_twice_where_asked() -> None:
    assert [n for n in range(4) if Items(count=2).holds(range(n))] == [2]
    assert [n for n in range(4) if Items(most=2).holds(range(n))] == [0, 1, 2]
    assert Items().holds((1, 1)) and not Items(unique=True).holds((1, 1)) and not Items(distinct=True).holds((1, 1))
    assert Items(unique=True).holds((2, 1)) and Items(distinct=True).holds((2, 1))
    words = [
        i.words("numbers") for i in (Items(), Items(count=3), Items(unique=True), Items(distinct=True), Items(text="x"))
    ]
    assert words == ["a list of numbers", "a list of 3 numbers", *["a list of different numbers"] * 2, "x"]


def test_a_form_is_matched_whole_and_over_lines() -> None:
    form = Form(r"a.*b", "a to b")
    assert form.holds("a\nb") and not form.holds("a b c") and not form.holds("xab") and form.words() == "a to b"


def test_the_named_types_hold_what_their_names_say() -> None:
    inside = {
        Positive: [0.5, 1, 2],
        NonNegative: [0, 0.5, 1, 2],
        Share: [0, 0.5, 1],
        ShareBelowOne: [0, 0.5],
        Count: [1, 2],
        CountOrZero: [0, 1, 2],
        Seconds: [0, 0.5, 1, 2],
    }
    for hint, values in inside.items():
        assert [n for n in (-1, 0, 0.5, 1, 2) if _holds(hint, n)] == values
    assert _holds(Text, " a\n") and not _holds(Text, " \n ") and not _holds(PositiveDuration, "0 steps")


def _holds(hint: Any, value: object) -> bool:
    try:
        convert(hint, value, "x")
    except UserError:
        return False
    return True
