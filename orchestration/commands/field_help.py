"""What there is to know of every field of a configuration: for `pretrain --help-fields` and for docs/configuration.md.

python -m orchestration.commands.field_help > docs/configuration.md
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.configuration import dataclass_of, expected, hints, is_required, join, to_dict


@dataclass(frozen=True)
class FieldHelp:
    path: str
    hint: Any
    """Its type, with range and unit."""
    default: str
    help: str

    @property
    def group(self) -> str:
        return self.path.rpartition(".")[0]


def describe(kind: type, path: str = "") -> Iterator[FieldHelp]:
    """All fields of a configuration, those of its parts included, in the order of their declaration."""
    docs, later = field_docs(kind), []
    for field in dataclasses.fields(kind):
        hint, place = hints(kind)[field.name], join(path, field.name)
        if part := dataclass_of(hint):
            later.append((part, place))
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if is_required(field) else words(to_dict(default))
        yield FieldHelp(place, hint, shown, docs.get(field.name, ""))
    for part, place in later:
        yield from describe(part, place)


def words(value: Any) -> str:
    """A value as the command line takes it, short."""
    if isinstance(value, list):
        some = ", ".join(map(words, value[:5])) + (f", ... ({len(value)} values)" if len(value) > 5 else "")
        return some or "none"
    if value is None or value == {}:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


def terminal_lines(run: Any | None) -> Iterator[str]:
    """Of a Run, for people at a terminal, with the values of `run` or the defaults of the fields."""
    from pipeline.training.run import Run

    values = _flat(to_dict(run)) if run else {}

    for group, fields in itertools.groupby(describe(Run), key=lambda f: f.group):
        yield f"{group or 'the run'}:"
        for field in fields:
            shown = words(values[field.path]) if field.path in values else field.default
            yield f"  --{field.path}  ({shown})"
            text = ". ".join(part.rstrip(".") for part in (field.help, f"Takes {expected(field.hint)}") if part)
            yield textwrap.fill(
                text + ".", 79, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
            )
        yield ""


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    found = {join(path, key): value for key, value in tree.items()}
    parts = {key: value for key, value in found.items() if isinstance(value, dict)}
    return found | {k: v for part, value in parts.items() for k, v in _flat(value, part).items()}


def page() -> str:
    """docs/configuration.md."""
    from pipeline.data.sources.cards import Card
    from pipeline.models.backbone import OPTION_TYPES
    from pipeline.training.run import Run
    from transfer.protocol.method_settings import Settings
    from transfer.protocol.methods import METHOD_KINDS
    from transfer.protocol.suite_files import SuiteFile
    from transfer.protocol.tasks import TaskEntry

    lines = [
        "# Fields of every configuration",
        "",
        "Made by `python -m orchestration.commands.field_help` from the types and docstrings in the code; a test keeps it",
        "current. Numbers may be written 1e-5 and 1e6, lists as `0.5,0.5,0.5`, and `none` stands for no value.",
        "",
        "## A run",
        "",
        "`normfree pretrain RECIPE --PATH VALUE`, or the same in a FILE.yaml, nested by the dots.",
    ]
    for group, fields in itertools.groupby(describe(Run), key=lambda f: f.group):
        lines += ["", f"### {group or 'The run itself'}", "", *_table(fields)]
    lines += ["", "### model.options", "", "Of our networks; timm:NAME takes those of timm's model.", ""]
    options = (FieldHelp(name, hint, "", "") for name, hint in OPTION_TYPES.items())
    lines += ["| option | takes |", "|---|---|", *(f"| `{o.path}` | {_cell(expected(o.hint))} |" for o in options)]
    lines += [
        "",
        "## A suite",
        "",
        *_table(describe(SuiteFile)),
        "",
        "### A task of a suite",
        "",
        *_table(describe(TaskEntry)),
    ]
    lines += ["", "### Every method of a suite", "", *_table(describe(Settings))]
    shared = {field.path for field in describe(Settings)}
    for kind in dict.fromkeys(settings for settings, *_ in METHOD_KINDS.values()):
        names = ", ".join(f"`{name}`" for name, (settings, *_) in METHOD_KINDS.items() if settings is kind)
        own = [field for field in describe(kind) if field.path not in shared]
        lines += ["", f"### {names}", "", " ".join((inspect.getdoc(kind) or "").split()), "", *_table(own)]
    return "\n".join([*lines, "", "## A dataset card", "", *_table(describe(Card)), ""])


def _table(fields: Iterable[FieldHelp]) -> list[str]:
    rows = [f"| `{f.path}` | {_cell(f.default)} | {_cell(expected(f.hint))} | {_cell(f.help)} |" for f in fields]
    return ["| field | default | takes | |", "|---|---|---|---|", *rows]


def _cell(text: str) -> str:
    """Our own words, which are Markdown already, in a table."""
    return text.replace("|", "\\|")


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Field -> the docstring below it, of the class and those that it is made from."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for field, text in itertools.pairwise(typing.cast(ast.ClassDef, tree).body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


if __name__ == "__main__":
    print(page(), end="")
