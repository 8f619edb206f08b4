"""Recipes: functions that return a whole Run. The header of each says its command, hardware, hours and result.

`get("name")` returns the Run; the command line overrides its fields by dotted path. Each recipe of the papers has a twin
`NAME_tiny` that a CPU runs in seconds (`pipeline.recipes.twins`).
"""

from __future__ import annotations

import difflib

from pipeline.errors import UserError
from pipeline.recipes import finetune, imagenet, large_scale, nf_regnet, nf_resnet, tiny
from pipeline.recipes.recipe import Recipe
from pipeline.recipes.twins import SUFFIX, twin
from pipeline.training.run import Run

PAPERS: dict[str, Recipe] = {
    **imagenet.RECIPES,
    **large_scale.RECIPES,
    **finetune.RECIPES,
    **nf_resnet.RECIPES,
    **nf_regnet.RECIPES,
}
"""Those that follow a publication; the others are for two CPU cores."""

TWINS: dict[str, Recipe] = {f"{name}{SUFFIX}": twin(name, recipe) for name, recipe in PAPERS.items()}
RECIPES: dict[str, Recipe] = {**tiny.RECIPES, **PAPERS, **TWINS}


def find(name: str) -> Recipe:
    """Raises UserError with the nearest name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "'normfree pretrain --list' prints them all."
        raise UserError(f"no recipe {name!r}; {hint} A file with a Run is given by a path that ends in .yaml")
    return RECIPES[name]


def listing() -> list[str]:
    """One line a recipe, twins left out but for a line about them."""
    lines = [f"{name:38} {recipe.summary}" for name, recipe in RECIPES.items() if name not in TWINS]
    return [*lines, f"{'NAME' + SUFFIX:38} Tiny twin of any of the {len(PAPERS)} that follow a paper: seconds on a CPU"]


def get(name: str) -> Run:
    return find(name).make()
