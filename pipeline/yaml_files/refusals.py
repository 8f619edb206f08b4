"""Where in a document something is refused: its place, and the line at which that stands in a YAML file."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import UserError
from pipeline.yaml_files.parse import yaml_loader


@contextlib.contextmanager
def located(where: str, data: bytes | str | None = None) -> Iterator[None]:
    """Puts the document before whatever is wrong in it, with the line where `data` is its YAML."""
    try:
        yield
    except UserError as error:
        text, place = str(error), error.place
        line = None if data is None or place is None else line_of(data, place)
        rest = text.removeprefix(where) if text.startswith(where) else f": {text}"
        error.args = (f"{where}{'' if line is None else f', line {line}'}{rest}",)
        if data is not None:
            error.place = None  # it is said, and means nothing in a document that names this one
        raise


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """Puts the place in the document before whatever is wrong there."""
    try:
        yield
    except UserError as error:
        error.args = (f"{place}: {error}",)
        error.place = f"{place}.{error.place}" if error.place else place
        raise


def blamed(sentence: str, path: str, data: Mapping[str, Any]) -> str | None:
    """Path of the first field of the mapping at `path` that a sentence about all of it names; words of prose do not count."""
    own = f"{path.rpartition('.')[2]}."
    for number, word in enumerate(re.findall(r"\w(?:[\w.]*\w)?", sentence)):
        field = word.removeprefix(own)
        if field.partition(".")[0] in data and (number == 0 or re.search(r"[._]", word)):
            return f"{path}.{field}" if path else field
    return path or None


def line_of(data: bytes | str, place: str) -> int | None:
    """The line, from 1, of the field at `place`, such as `methods.ridge.l2`, `tasks[1].card` or `methods[knn]`.

    Of a field that is not there, the line of the innermost thing on the way to it that is: of the task that lacks its card.
    None where the file is empty or no YAML.
    """
    import yaml

    try:
        node = yaml.compose(data.decode("utf-8-sig") if isinstance(data, bytes) else data, Loader=yaml_loader())
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    if node is None:
        return None
    line, found = node.start_mark.line, _below(node, place)
    while found is not None:
        node, line, rest = found
        found = _below(node, rest) if rest else None
    return int(line) + 1


def _below(node: Any, place: str) -> tuple[Any, int, str] | None:
    """The next node on the way to `place`, its line from 0, and the rest of the way."""
    import yaml

    if isinstance(node, yaml.SequenceNode) and (match := re.match(r"\[([^\]]*)\]\.?", place)):
        name = match[1]
        is_number = name.isdecimal() and len(name) < 10
        items = node.value[int(name) :] if is_number else [item for item in node.value if item.value == name]
        return (items[0], items[0].start_mark.line, place[match.end() :]) if items else None
    # A key may have dots in it: the longest that fits is meant. A mapping's own keys come before merged ones.
    fits = [pair for pair in _pairs(node) if re.match(re.escape(pair[0].value) + r"(?=[.\[]|\Z)", place)]
    if not fits:
        return None
    key, value = max(fits, key=lambda pair: len(pair[0].value))
    return value, key.start_mark.line, place[len(key.value) :].removeprefix(".")


def _pairs(node: Any, depth: int = 8) -> Iterator[tuple[Any, Any]]:
    import yaml

    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    yield from ((key, value) for key, value in pairs if isinstance(key, yaml.ScalarNode) and key.value != "<<")
    for key, value in pairs if depth else []:
        if key.value == "<<":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from _pairs(merged, depth - 1)
