r"""The one door for JSON and JSONL that somebody else may have written, typed values out. YAML has `pipeline.yaml_files`.

    commit = documents.read(url, Commit)                     a file, bounded, parsed, as a dataclass
    commit = documents.parse(data, Commit, where)            the same of bytes
    value = documents.parse_json(data, where)                bytes -> plain containers
    for line, value in documents.parse_jsonl(data, where):   one a line
    entry = documents.convert(value, Entry, where)           plain containers -> a dataclass, types and ranges checked

A dataclass says what is allowed by its annotations: `digest: Sha256`, `name: FileName`, `num_samples: Count`. Whatever is
wrong is a UserError: the file, the place in it, what is wrong, what to do. Time and memory are bounded by the size of the
file, which is bounded first. Fields that a dataclass does not have are passed over, as later versions may write some.
"""

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
    return parse(objects.read_bytes(url, max_bytes=max_bytes + 1), kind, url, max_bytes=max_bytes, remedy=remedy)


def parse(data: bytes | str, kind: type[T], where: str, *, max_bytes: int = MAX_BYTES, remedy: str = REMEDY) -> T:
    """`read`, of a document that is at hand."""
    return convert(parse_json(data, where, max_bytes=max_bytes, remedy=remedy), kind, where, remedy=remedy)


def read_json(url: str, *, max_bytes: int = MAX_BYTES, remedy: str = REMEDY) -> Any:
    """The JSON document at `url` as plain containers; errors as of `read`."""
    return parse_json(objects.read_bytes(url, max_bytes=max_bytes + 1), url, max_bytes=max_bytes, remedy=remedy)


def parse_json(data: bytes | str, where: str, *, max_bytes: int = MAX_BYTES, remedy: str = REMEDY) -> Any:
    """Plain containers. Raises UserError for what is no UTF-8 or no JSON, for a key that stands twice, NaN, infinities, whole
    numbers of more than 20 digits, more than 64 levels, and files that are empty or too large."""
    text = text_of(data, where, max_bytes, remedy)
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
    text = text_of(data, where, max_bytes, remedy) if data else ""
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
        place, sentence = _sentence(str(error))
        raise UserError.at(place, f"{where} is not usable: {sentence}; {remedy}") from None
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


def text_of(data: bytes | str, where: str, max_bytes: int, remedy: str) -> str:
    """What is in a document. UserError if that is too large, no UTF-8, or nothing."""
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


def _sentence(message: str) -> tuple[str, str]:
    """The place and what msgspec says of it ("Expected `int`, got `str` - at `$.files[0].size`"), in our words."""
    what, _, place = message.partition(" - at `")
    place = place.rstrip("`").removeprefix("$").removeprefix(".")
    for meta in (kind.__metadata__[0] for kind in (Sha256, FileName, RelativePath)):  # type: ignore[attr-defined]
        what = what.replace(f"`str` matching regex {meta.pattern!r}", meta.description)
    what = re.sub(r"`(\w+)`", lambda match: _WORDS.get(match[1], f"'{match[1]}'"), what)
    what = what.replace("Expected ", "it needs ", 1).replace(", got ", " and has ", 1)
    what = re.sub(r"^Object missing required field", "it lacks", what)
    return place, f"{f'at {excerpt(place, 120)}: ' if place else ''}{excerpt(what, 200)}"
