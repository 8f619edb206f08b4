"""Reading what a suite states: numbers as YAML gives them, and the nearest word to one that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pipeline.errors import UserError


def nearest(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"


def whole(value: Any, where: str, *, zero: bool = False) -> int:
    if type(value) is not int or value < (0 if zero else 1):
        raise UserError(f"{where} is {value!r}; set a whole number of {0 if zero else 1} or more")
    return value


def number(value: Any, where: str, *, zero: bool = False) -> float:
    # YAML reads 1e-5 as text: only 1.0e-5 is a number to it.
    try:
        found = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        found = -1.0
    if not 0 <= found < float("inf") or (found == 0 and not zero):
        raise UserError(f"{where} is {value!r}; set a positive number")
    return found
