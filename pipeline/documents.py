r"""The one door for documents that somebody else may have written: JSON, JSONL and YAML in, typed values out.

    commit = documents.read(url, Commit)                     a file, bounded, parsed, as a dataclass
    value = documents.parse_json(data, where)                bytes -> plain containers
    for line, value in documents.parse_jsonl(data, where):   one a line
    value = documents.parse_yaml(data, where)                YAML files of users
    entry = documents.convert(value, Entry, where)           plain containers -> a dataclass, types and ranges checked

A dataclass says what is allowed by its annotations: `digest: Sha256`, `name: FileName`, `num_samples: Count`. Whatever is
wrong is a UserError: the file, the place in it, what is wrong, what to do. Time and memory are bounded by the size of the
file, which is bounded first. Fields that a dataclass does not have are passed over, as later versions may write some.
"""

import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from pipeline.errors import UserError
from pipeline.storage import objects

MAX_BYTES = 16 << 20
"""Of a document, unless its reader says otherwise. Parsed, JSON takes up to 30 times its size."""
MAX_YAML_BYTES = 4 << 20
MAX_YAML_VALUES = 200_000
"""With every alias written out."""
MAX_DEPTH = 64
MAX_DIGITS = 20
REMEDY = "restore it, or write it again"

# \A and \Z, since $ also matches before a line end. No control or surrogate characters, none that turn the direction of text.
_NAME = r"(?!\.{1,2}(?:/|\Z))[^/\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+"
Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z", description="64 hex digits")]
FileName = Annotated[str, Meta(pattern=rf"\A{_NAME}\Z", max_length=255, description="a plain file name")]
RelativePath = Annotated[str, Meta(pattern=rf"\A{_NAME}(?:/{_NAME})*\Z", max_length=1024, description="a path below")]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
"""Also a size in bytes, a step, a position."""
Positive = Annotated[int, Meta(ge=1, le=1 << 53)]
Share = Annotated[float, Meta(ge=0, le=1)]
Dimensions = Annotated[list[Count], Meta(max_length=32)]  # the shape of a tensor
Text = Annotated[str, Meta(max_length=1 << 16)]

T = TypeVar("T")


def read(url: str, kind: type[T], *, max_bytes: int = MAX_BYTES, remedy: str = REMEDY) -> T:
    """The JSON document at `url` as a `kind`, which is a dataclass or any type that msgspec knows.

    Raises:
        FileNotFoundError: there is none.
        UserError: empty, cut, damaged, too large, or not of this kind.
    """
    return convert(read_json(url, max_bytes=max_bytes, remedy=remedy), kind, url, remedy=remedy)


def read_json(url: str, *, max_bytes: int = MAX_BYTES, remedy: str = REMEDY) -> Any:
    """The JSON document at `url` as plain containers; errors as of `read`."""
    return parse_json(objects.read_bytes(url, max_bytes=max_bytes + 1), url, max_bytes=max_bytes, remedy=remedy)


def parse_json(data: bytes | str, where: str, *, max_bytes: int = MAX_BYTES, remedy: str = REMEDY) -> Any:
    """Plain containers. Raises UserError for what is no UTF-8 or no JSON, for a key that stands twice, NaN, infinities, whole
    numbers of more than 20 digits, more than 64 levels, and files that are empty or too large."""
    text = _text(data, where, max_bytes, remedy)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_whole, parse_float=_finite, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        cut = "cut short" if error.pos >= len(text.rstrip()) - 1 else "damaged"
        raise UserError(f"{where} is {cut} (line {error.lineno} column {error.colno}: {error.msg}); {remedy}") from None
    except ValueError as error:  # of our own hooks
        raise UserError(f"{where} is not usable: {error}; {remedy}") from None
    except RecursionError:
        raise UserError(f"{where} has more than {MAX_DEPTH} levels; {remedy}") from None
    if isinstance(value, dict | list) and text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise UserError(f"{where} has more than {MAX_DEPTH} levels; {remedy}")
    return value


def parse_jsonl(
    data: bytes | str, where: str, *, max_bytes: int = MAX_BYTES, remedy: str = REMEDY
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line that is not empty; errors as of `parse_json`, with the line.

    Only line feeds end a line: JSON may hold U+2028 and U+0085 as they are.
    """
    text = _text(data, where, max_bytes, remedy) if data else ""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{where}, line {number},", max_bytes=max_bytes, remedy=remedy)


def convert(value: Any, kind: type[T], where: str, *, remedy: str = REMEDY) -> T:
    """Plain containers as a `kind`: types exactly (no text for numbers), ranges and patterns as annotated.

    Raises:
        UserError: the first thing that does not fit, with its place in the document.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} is not usable: {_sentence(str(error))}; {remedy}") from None
    except UnicodeEncodeError:  # half of a surrogate pair in a key
        raise UserError(f"{where} is not usable: it has a name that is no Unicode text; {remedy}") from None


def is_file_name(value: object) -> bool:
    """Whether a name from outside may become a file in a folder of ours."""
    return isinstance(value, str) and len(value) <= 255 and re.fullmatch(_NAME, value) is not None


def excerpt(value: object, length: int = 60) -> str:
    """A value from outside for a sentence: on one line, printable, clipped."""
    text = value if isinstance(value, str) else repr(value) if isinstance(value, int | float | None) else ""
    text = text[: length + 1] if text else f"a {type(value).__name__}"
    clipped = text[:length] + ("..." if len(text) > length else "")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in clipped)


def _text(data: bytes | str, where: str, max_bytes: int, remedy: str) -> str:
    if len(data) > max_bytes:
        raise UserError(f"{where} is larger than {max_bytes >> 20} MiB, which no such file is; {remedy}")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); {remedy}") from None
    if not text.strip():
        raise UserError(f"{where} is empty; {remedy}")
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{excerpt(twice)}' stands twice")
    return found


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {excerpt(text)} is too large")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _is_deep(value: Any) -> bool:
    """Level by level, since every recursion over it has a limit, too."""
    level = [value]
    for _ in range(MAX_DEPTH):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in children for child in each if isinstance(child, dict | list)]
    return bool(level)


_WORDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "null": "nothing"}
_WORDS |= {"array": "a list", "object": "a mapping"}


def _sentence(message: str) -> str:
    """What msgspec says ("Expected `int`, got `str` - at `$.files[0].size`"), in our words."""
    what, _, place = message.partition(" - at `")
    place = place.rstrip("`").removeprefix("$").removeprefix(".")
    for meta in (kind.__metadata__[0] for kind in (Sha256, FileName, RelativePath)):  # type: ignore[attr-defined]
        what = what.replace(f"`str` matching regex {meta.pattern!r}", meta.description)
    what = re.sub(r"`(\w+)`", lambda match: _WORDS.get(match[1], f"'{match[1]}'"), what)
    what = what.replace("Expected ", "it needs ", 1).replace(", got ", " and has ", 1)
    what = re.sub(r"^Object missing required field", "it lacks", what)
    return f"{f'at {excerpt(place, 120)}: ' if place else ''}{excerpt(what, 200)}"


def parse_yaml(data: bytes | str, where: str, *, max_bytes: int = MAX_YAML_BYTES, remedy: str = "mend the file") -> Any:
    """Plain containers of a YAML file of one document, which may be a configuration that a person wrote.

    Anchors and merge keys are understood as long as what they stand for is bounded. What YAML 1.1 would silently make of a
    text is refused with its line: a key that stands twice, 010 (octal), 1:30 (base 60), NaN and infinities. Dates stay text.
    Of tags, only those of plain values are known.

    Raises:
        UserError: not UTF-8, not YAML, or one of the above.
    """
    import yaml

    try:
        text = _text(data, where, max_bytes, "save it as UTF-8, or mend it")
        loader = _yaml_loader()
        _bound_yaml(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" (line {mark.line + 1} column {mark.column + 1})" if mark else ""
        what = excerpt(" ".join(filter(None, [error.context, error.problem])), 200)
        raise UserError(f"{where} is not usable as YAML{at}: {what}; {remedy}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not usable as YAML: {excerpt(str(error), 200)}; {remedy}") from None


def _bound_yaml(events: Iterator[Any]) -> None:
    """Depth, and the number of values with aliases written out, before anything is made of them."""
    from yaml import events as kinds
    from yaml.error import MarkedYAMLError

    sizes: dict[str, int] = {}  # of what an anchor stands for
    stack: list[tuple[str | None, int]] = []  # (anchor, values before it)
    total, problem = 0, None
    for event in events:
        if isinstance(event, kinds.CollectionStartEvent):
            stack.append((event.anchor, total))
            total += 1
        elif isinstance(event, kinds.CollectionEndEvent):
            anchor, before = stack.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, kinds.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, kinds.AliasEvent):
            if event.anchor not in sizes:
                problem = "an alias of nothing, or of what it is in"
            total += sizes.get(str(event.anchor), 0)
        if len(stack) > MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels"
        if total > MAX_YAML_VALUES:
            problem = f"more than {MAX_YAML_VALUES} values"
        if problem:
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


@functools.cache
def _yaml_loader() -> Any:
    import yaml

    prefix = "tag:yaml.org,2002:"

    def mistake(problem: str, node: Any) -> Exception:
        return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """The safe loader, without what it guesses."""

        def flatten_mapping(self, node: Any) -> None:
            keys: set[Any] = set()
            for key_node, _ in node.value if id(node) not in flat(self) else []:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise mistake("a key that is no plain value", key_node)
                key = key_node.tag if key_node.tag == f"{prefix}merge" else self.construct_object(key_node)
                if key in keys:
                    raise mistake(f"the key '{excerpt(key)}' stands twice", key_node)
                keys.add(key)
            flat(self).add(id(node))  # merging adds keys to a node, which may be merged into several
            super().flatten_mapping(node)

    def flat(loader: Any) -> set[int]:
        return loader.__dict__.setdefault("_flat", set())

    def number(loader: Any, node: Any) -> Any:
        text = node.value.replace("_", "")
        if re.fullmatch("[-+]?0[0-9]+", text):
            raise mistake(f"{excerpt(text)} would be octal: write it without the 0 in front, or in quotes", node)
        if ":" in text:
            raise mistake(f"{excerpt(text)} would be a number of base 60: write it in quotes", node)
        if len(text) > MAX_DIGITS and node.tag.endswith(":int"):
            raise mistake(f"a whole number of {len(text)} digits", node)
        value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
        if not math.isfinite(value):
            raise mistake(f"{excerpt(text)} is no finite number", node)
        return value

    kept = {f"{prefix}{tag}" for tag in ("null", "bool", "str", "seq", "map")} | {None}
    Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in kept}
    Loader.yaml_constructors |= {f"{prefix}int": number, f"{prefix}float": number}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":value"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader
