"""The Run: one frozen description of a training run, round trip to YAML, unknown keys refused.

Each part is declared beside the code that it configures and only composed here. A recipe (`pipeline.recipes`) is a function
that returns a whole Run; a fine-tuning trial (`transfer.sweep.finetune`) makes one too. There is no second configuration: the
DeepSpeed dictionary is derived from the Run in `pipeline.engine.deepspeed_engine`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from pipeline.duration import Duration
from pipeline.errors import UserError


def to_dict(value: Any) -> Any:
    """Plain containers (as YAML and JSON hold them) of a configuration dataclass."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


def from_dict(kind: type, data: Any, path: str = "") -> Any:
    """The dataclass `kind` from plain containers. Raises UserError naming the field, and the nearest name if unknown."""
    if not isinstance(data, dict):
        raise UserError(f"{path or kind.__name__} must be a mapping of fields, not {data!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise UserError(unknown_field(f"{path}.{key}" if path else str(key), str(key), fields))
    required = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in data
    ]
    if required:
        raise UserError(f"{path or 'the configuration'} lacks {', '.join(required)}; set it")
    values = {k: _coerce(hints[k], v, f"{path}.{k}" if path else k) for k, v in data.items()}
    return kind(**values)


def unknown_field(path: str, key: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the fields here are {', '.join(known)}"
    return f"no field {path!r} in the configuration; {hint}"


def _coerce(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in options:
                return None
            raise UserError(f"{path} must not be empty")
        return _coerce(next(o for o in options if o is not type(None)), value, path)
    if hint is Duration:
        return value if isinstance(value, Duration) else Duration.parse(value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise UserError(f"{path} is {value!r}; choose one of {choices}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{path} must be a list, not {value!r}")
        return tuple(_coerce(typing.get_args(hint)[0], v, path) for v in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path} must be a mapping, not {value!r}")
        return dict(value)
    return _scalar(hint, value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UserError(f"{path} must be true or false, not {value!r}")
    try:
        if hint is int:
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(value)
        if hint is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
    except (TypeError, ValueError):
        kind = "a whole number" if hint is int else "a number"
        raise UserError(f"{path} must be {kind}, not {value!r}") from None
    if hint is str:
        if not isinstance(value, str):
            raise UserError(f"{path} must be text, not {value!r}")
        return value
    return value


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
