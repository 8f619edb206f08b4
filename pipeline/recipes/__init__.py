"""Recipes: functions that return a whole Run. The header of each says its command, hardware, hours and result.

`get("name")` returns the Run; the command line overrides its fields by dotted path.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from pipeline.config import Run
from pipeline.errors import UserError
from pipeline.recipes import imagenet, tiny

RECIPES: dict[str, Callable[[], Run]] = {**tiny.RECIPES, **imagenet.RECIPES}


def get(name: str) -> Run:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(RECIPES))}"
        raise UserError(f"no recipe {name!r}; {hint} A file with a Run is given by a path that ends in .yaml")
    return RECIPES[name]()
