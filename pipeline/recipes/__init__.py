"""Recipes: functions that return a whole Run. The header of each says its command, hardware, hours and result.

`get("name")` returns the Run; the command line overrides its fields by dotted path. Each recipe of the papers has a smoke variant
`NAME_tiny` that a CPU runs in seconds (`pipeline.recipes.smoke_variants`).
"""

import difflib

from pipeline.errors import UserError
from pipeline.recipes import finetune, imagenet, large_scale, nf_regnet, nf_resnet, tiny
from pipeline.recipes.recipe import Recipe
from pipeline.recipes.smoke_variants import SUFFIX, smoke_variant
from pipeline.training.run import Run

PAPERS: dict[str, Recipe] = {
    **imagenet.RECIPES,
    **large_scale.RECIPES,
    **finetune.RECIPES,
    **nf_resnet.RECIPES,
    **nf_regnet.RECIPES,
}
"""Those that follow a publication; the others are for two CPU cores."""

SMOKE_VARIANTS: dict[str, Recipe] = {f"{name}{SUFFIX}": smoke_variant(name, recipe) for name, recipe in PAPERS.items()}
RECIPES: dict[str, Recipe] = {**tiny.RECIPES, **PAPERS, **SMOKE_VARIANTS}


def find(name: str) -> Recipe:
    """Raises UserError with the nearest name."""
    if name not in RECIPES:
        near = nearest(name)
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?" if near else "'normfree pretrain --list' prints them all."
        )
        raise UserError(f"no recipe {name!r}; {hint} A file with a Run is given by a path that ends in .yaml")
    return RECIPES[name]


def nearest(name: str) -> list[str]:
    """Recipes that share most words with a name, at most three; by spelling where none shares two."""
    words = set(name.lower().replace("-", "_").split("_"))
    shared = {recipe: len(words & set(recipe.split("_"))) for recipe in RECIPES}
    most = max(shared.values())
    close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.9 if most > 1 else 0.4)
    if close or most < 2:
        return close
    return sorted((r for r in RECIPES if shared[r] == most), key=lambda r: (len(r), r))[:3]


def listing() -> list[str]:
    """One line a recipe, and one line about all smoke variants."""
    lines = [f"{name:38} {recipe.summary}" for name, recipe in RECIPES.items() if name not in SMOKE_VARIANTS]
    return [
        *lines,
        f"{'NAME' + SUFFIX:38} Smoke variant of any of the {len(PAPERS)} that follow a paper: seconds on a CPU",
    ]


def get(name: str) -> Run:
    return find(name).make()
