"""From text and plain containers to typed values: one converter for runs, cards, suites, methods and searches.

A configuration is a frozen dataclass. The type of a field says everything: what is read (`Literal` of any type, tuples,
mappings, nested dataclasses, `Duration`), its range and its unit (`Annotated`), and the words for both, which error messages,
`--help-fields` and docs/configuration.md share. The docstring below a field is its help.

    momentum: Annotated[float, Range(0, 1, without="high")] = 0.9
    \"\"\"Of SGD; 0 = none.\"\"\"
"""

import collections.abc
import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.field_types import Form, Items, Range, Unit
from pipeline.yaml_files.refusals import blamed

Config = TypeVar("Config")


class _Mismatch(ValueError):
    """A value that is not of the type; becomes the sentence about the whole field."""


def convert(hint: Any, value: Any, path: str) -> Any:
    """The value of a field of type `hint`, from text (as the command line gives it) or plain containers (as YAML does).

    Raises:
        UserError: it is none; the sentence names `path`, the value and what the type expects.
    """
    try:
        return _read(hint, value, path)
    except _Mismatch:
        choices = list(map(str, typing.get_args(_base(hint)[0]))) if _is_literal(hint) else []
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        advice = f" (did you mean {near[0]!r}?)" if near else ""
        if not advice and _base(hint)[0] is str and not isinstance(value, str):
            advice = " (put it in quotes)"
        raise UserError.at(path, f"{path} is {_shown(value)}; set {expected(hint)}{advice}") from None
    except UserError as error:
        error.place = path if error.place is None else error.place
        raise


def from_dict(kind: type[Config], data: Any, path: str = "") -> Config:
    """The dataclass `kind` from plain containers. Raises UserError naming the field, and the nearest name if unknown."""
    if isinstance(data, kind):
        return data
    if not isinstance(data, Mapping):
        raise UserError.at(path, f"{path or 'the configuration'} is {_shown(data)}; set a mapping of field to value")
    declared: dict[str, Any] = hints(typing.cast(Any, kind))
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError.at(join(path, key), unknown_field(join(path, key), str(key), fields))
    missing = [f.name for f in fields.values() if is_required(f) and f.name not in data]
    if missing:
        raise UserError.at(path, f"{path or 'the configuration'} lacks {', '.join(missing)}; set it")
    values = {k: convert(declared[k], _listed(declared[k], v, join(path, k)), join(path, k)) for k, v in data.items()}
    try:
        return kind(**values)
    except UserError as error:  # of `__post_init__`, about fields that do not fit together
        error.place = blamed(str(error), path, data) if error.place is None else error.place
        raise


def check_fields(config: Any, path: str = "") -> None:
    """For `__post_init__`: the values that Python code gives meet the same types and ranges as text does."""
    declared: dict[str, Any] = hints(typing.cast(Any, type(config)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value) or isinstance(value, Duration):
            convert(declared[field.name], value, join(path, field.name))


def to_dict(value: Any) -> Any:
    """Plain containers (as YAML and JSON hold them) of a configuration dataclass."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


def expected(hint: Any) -> str:
    """What the type of a field takes, in words: "a whole number of 1 or more", "one of 0, 1, 2, 3", ..."""
    base, marks = _base(hint)
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    bounds = " ".join(m.words() for m in marks if isinstance(m, Range))
    if origin in (typing.Union, types.UnionType):
        kinds = [expected(a) for a in arguments if a is not type(None)]
        return ", or ".join([*kinds, "none"] if type(None) in arguments else kinds)
    if origin is Literal:
        return f"one of {', '.join(str(a) or 'empty' for a in arguments)}"
    if origin in (tuple, list):
        items = next((m for m in marks if isinstance(m, Items)), Items())
        what = "numbers" if _base(arguments[0])[0] in (int, float) else "values"
        return f"{items.words(what)}, each {expected(arguments[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"a mapping of {'name' if arguments[0] is str else expected(arguments[0])} to {expected(arguments[1])}"
    if base is Duration:
        return f"a number{f' {bounds}' if bounds else ''} and a unit, as '20 epochs', '500 steps' or '1e6 samples'"
    if dataclasses.is_dataclass(base):
        return "a mapping of field to value"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "a value"}
    found = next((m.words() for m in marks if isinstance(m, Form)), words[base])
    unit = next((m for m in marks if isinstance(m, Unit)), None)
    return f"{found}{f' {bounds}' if bounds else ''}{f', in {unit.name} or with a unit' if unit else ''}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Advice about a word that is not among the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"


def unknown_field(path: str, key: str, known: Iterable[str]) -> str:
    return f"no field {path!r}; {nearest(key, known)}"


def dataclass_of(hint: Any) -> type | None:
    """The configuration that a field holds, where it has fields of its own (None is allowed besides)."""
    options = (hint, *typing.get_args(hint))
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o) and o is not Duration), None)


@functools.cache
def hints(kind: Any) -> dict[str, Any]:
    """Field -> type, ranges and units included."""
    return typing.get_type_hints(kind, include_extras=True)


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _base(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (hint.__origin__, hint.__metadata__) if typing.get_origin(hint) is Annotated else (hint, ())


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(_base(hint)[0]) is Literal


def _read(hint: Any, value: Any, path: str) -> Any:
    base, marks = _base(hint)
    found = _read_base(base, value, path, next((m for m in marks if isinstance(m, Unit)), None))
    if not all(m.holds(found) for m in marks if isinstance(m, Range | Items | Form)):
        raise _Mismatch
    return tuple(sorted(found)) if any(isinstance(m, Items) and m.distinct for m in marks) else found


def _read_base(base: Any, value: Any, path: str, unit: Unit | None) -> Any:
    origin, arguments = typing.get_origin(base), typing.get_args(base)
    if base is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(arguments, value, path)
    if origin is Literal:
        return _read_literal(arguments, value)
    if origin in (tuple, list):
        return origin(_read(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(_items(value)))
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            raise _Mismatch
        return {_read(arguments[0], k, path): _read(arguments[1], v, join(path, k)) for k, v in value.items()}
    if base is Duration:
        return value if isinstance(value, Duration) else Duration.parse(value, path)
    if dataclasses.is_dataclass(base):
        return from_dict(typing.cast(type, base), value, path)
    if base in (int, float):
        return _number(base, value, unit)
    if base is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, base):
        raise _Mismatch
    return value


def _read_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if type(None) in options and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    for option in options:
        try:
            if option is not type(None):
                return _read(option, value, path)
        except _Mismatch:
            continue
    raise _Mismatch


def _read_literal(choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        try:
            if _read(type(choice), value, "") == choice:
                return choice
        except _Mismatch:
            continue
    raise _Mismatch


def _listed(hint: Any, value: Any, path: str) -> Any:
    """The value, unless it is text for a list. That is the command line's way; in a document a comma in a name would cut it."""
    base = _base(hint)[0]
    options = typing.get_args(base) if typing.get_origin(base) in (typing.Union, types.UnionType) else (base,)
    lists = [typing.get_origin(_base(o)[0]) in (tuple, list) for o in options if o is not type(None)]
    if isinstance(value, str) and all(lists) and value.lower() not in ("none", "null"):
        raise UserError.at(path, f"{path} is {_shown(value)}; set {expected(hint)}, in brackets: [{value}]")
    return value


def _items(value: Any) -> list[Any]:
    """Of a list, of text as "0.5,0.5" or "[0.5, 0.5]", or of one number."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str):
        inner = value.strip().removeprefix("[").removesuffix("]").strip()
        return [item.strip() for item in inner.split(",")] if inner and inner.lower() not in ("none", "null") else []
    if not isinstance(value, list | tuple):
        raise _Mismatch
    return list(value)


def _number(kind: type, value: Any, unit: Unit | None) -> float | int:
    """YAML reads 1e-5 as text (only 1.0e-5 is a number to it), and a whole number may be written 1e6."""
    factor: float | None = 1.0
    if isinstance(value, str) and unit and (match := re.fullmatch(r"\s*([-+0-9.eE]+)\s*([A-Za-z]+)\s*", value)):
        value, factor = match[1], unit.factor(match[2])
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real) or factor is None:
        raise _Mismatch
    try:
        if kind is int and (isinstance(value, numbers.Integral) or re.fullmatch(r"\s*[-+]?\d+\s*", str(value))):
            return _bounded(int(typing.cast(Any, value)))
        found = float(value) * factor
    except (ValueError, OverflowError):
        raise _Mismatch from None
    if not math.isfinite(found) or (kind is int and not found.is_integer()):
        raise _Mismatch
    return _bounded(int(found)) if kind is int else found


def _bounded(value: int) -> int:
    if abs(value) >= 2**63:  # more than any counter, file or random generator takes
        raise _Mismatch
    return value
