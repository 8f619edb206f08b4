"""The one door for YAML that people write: run recipes, suites, cards, experiments.

content = parse_yaml(data, where)                plain containers, strictly
with located(where, data): ...                   `pipeline.yaml_files.refusals`: what is wrong is said with its line
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

from pipeline.documents import MAX_DEPTH, MAX_DIGITS, excerpt, text_of
from pipeline.errors import UserError
from pipeline.storage import objects

MAX_YAML_BYTES = 4 << 20
MAX_YAML_VALUES = 200_000
"""With every alias written out."""


def read_yaml(url: str) -> bytes:
    """A file for `parse_yaml`, which refuses it where it is longer than what is read here."""
    return objects.read_bytes(url, max_bytes=MAX_YAML_BYTES + 1)


def parse_yaml(data: bytes | str, where: str) -> Any:
    """Plain containers of a YAML file of one document, which may be a configuration that a person wrote.

    Anchors and merge keys are understood as long as what they stand for is bounded. What YAML 1.1 would silently make of a
    text is refused with its line: a key that stands twice, 010 (octal), 1:30 (base 60), NaN and infinities. Dates stay text.
    Of tags, only those of plain values are known.

    Raises:
        UserError: not UTF-8, not YAML, or one of the above.
    """
    import yaml

    try:
        text = text_of(data, where, MAX_YAML_BYTES, "save it as UTF-8, or mend it")
        loader = yaml_loader()
        _bound_yaml(yaml.parse(text, Loader=loader))
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" (line {mark.line + 1} column {mark.column + 1})" if mark else ""
        what = excerpt(" ".join(filter(None, [error.context, error.problem])), 200)
        raise UserError(f"{where} is not usable as YAML{at}: {what}; mend the file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not usable as YAML: {excerpt(str(error), 200)}; mend the file") from None


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
def yaml_loader() -> Any:
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
