"""Published weights by name: which haiku parameter of DeepMind's networks is which of ours, and in what layout."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from nfnet.model import NFNet
from nfnet.weights.state_dict import LoadReport, load_entries

_TREES = ("ema_params", "_ema_params", "ema", "params", "_params")
"""Where training checkpoints keep weights; the averaged ones are those that the papers evaluate."""


def _our_layout(tensor: torch.Tensor) -> torch.Tensor:
    """HWIO convolutions -> OIHW, IO linear weights -> OI, the rest as it is."""
    if tensor.dim() == 4:
        return tensor.permute(3, 2, 0, 1)
    if tensor.dim() == 2:
        return tensor.t()
    return tensor.reshape(1) if tensor.dim() == 0 else tensor


def load_haiku(model: NFNet, tree: Any, source: str, *, which: str | None = None) -> LoadReport:
    """Load a tree module -> name -> tensor, or whatever holds one: (params, state), {"ema_params": ..., ...}.

    Args:
        which: the entry to take where a checkpoint holds several, such as "params"; default: the averaged weights.
    Raises:
        ValueError: no such tree, or one of another network.
    """
    found = _find_tree(tree, which)
    if found is None:
        wanted = f"no {which!r} with modules" if which else "no modules"
        raise ValueError(f"{source} holds {wanted} of the published networks; give a file of their parameters")
    place, modules = found
    entries = {
        our_name(module, key): _our_layout(value if isinstance(value, torch.Tensor) else torch.tensor(value))
        for module, values in modules.items()
        for key, value in values.items()
    }
    notes = (f"its {place} were taken",) if place else ()
    return load_entries(model, entries, source, format="haiku", notes=notes)


def our_name(module: str, key: str) -> str:
    """Of a haiku parameter of any of the published networks; "module:key" for what none of them has.

    haiku names a module by its class in snake case, and its parent by the name that the class was given.
    """
    path = module.split("/~/")[1:]
    leaf = {"w": "weight", "b": "bias"}.get(key, key)
    if not path:
        return f"{module}:{key}"
    # A numbered name: nf_block is the first, nf_block_3 the fourth, stem_conv2 the third.
    found = re.fullmatch(r"(nf_block|nf_res_block|stem_conv)_?(\d{0,4})", path[0])
    number = int(found[2] or 0) if found else 0
    if found and found[1] == "stem_conv":
        return f"stem.{2 * number}.{leaf}"
    if found:
        inner = {"squeeze_excite/linear": "squeeze_excite.reduce", "squeeze_excite/linear_1": "squeeze_excite.expand"}
        return ".".join(["blocks", str(number), *([inner.get("/".join(path[1:]), path[-1])] if path[1:] else []), leaf])
    first = {"initial_conv": "stem.0", "linear": "head"}.get(path[0], path[0])
    return f"{first}.{leaf}"


def _find_tree(tree: Any, which: str | None) -> tuple[str, Mapping[str, Mapping[str, Any]]] | None:
    """(place, modules) of the first tree of parameters; the place is empty where there is only one."""
    if isinstance(tree, dict):
        if which is None and _is_modules(tree):
            return "", tree
        for name in (which,) if which else _TREES:
            if _is_modules(tree.get(name)):
                return str(name), tree[name]
    if isinstance(tree, list) and which is None:
        # (params, state) or (state, params): the state of these networks is empty.
        return next((("", part) for part in tree if _is_modules(part)), None)
    return None


def _is_modules(tree: Any) -> bool:
    """Module name -> dictionary of numbers, with at least one module of a published network."""
    return (
        isinstance(tree, dict)
        and all(isinstance(k, str) and isinstance(v, dict) for k, v in tree.items())
        and all(isinstance(k, str) and isinstance(x, torch.Tensor | float) for v in tree.values() for k, x in v.items())
        and any("/~/" in module for module in tree)
    )


def unflattened(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"module/name": value} -> {module: {name: value}}; "module:name" likewise."""
    tree: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        module, _, name = key.rpartition(":" if ":" in key else "/")
        tree.setdefault(module, {})[name] = value
    return tree
