"""All methods, found in the folders next to this file: a new file there is a new method, and nothing else has to know it."""

import difflib
import importlib
import inspect
import pkgutil
from dataclasses import fields
from typing import Any

import nfnet.normalizers
from nfnet.normalizers.method import METHODS, Method

for _found in pkgutil.walk_packages(nfnet.normalizers.__path__, "nfnet.normalizers."):
    if _found.name.count(".") > 2:  # the folders' files; the ones next to this one are no methods
        importlib.import_module(_found.name)


def list_methods() -> list[str]:
    return sorted(METHODS)


def get_method(name: str) -> type[Method]:
    """ValueError has the nearest names."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4)
        raise ValueError(f"no method {name!r}; the nearest names are {', '.join(near or sorted(METHODS))}")
    return METHODS[name]


def make_method(name: str, **settings: Any) -> Method:
    """A method with its settings. ValueError for an unknown name or setting."""
    cls = get_method(name)
    known = [f.name for f in fields(cls)]
    for key in settings:
        if key not in known:
            raise ValueError(f"the method {name} has no setting {key!r}; it has {', '.join(known) or 'none'}")
    return cls(**settings)


def page(name: str) -> str:
    """What the method's module says of it: idea, formula, training and evaluation, when to choose it, source, uncertainty."""
    return inspect.getdoc(inspect.getmodule(get_method(name))) or ""
