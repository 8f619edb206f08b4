"""Every field of every configuration: by the command line, by YAML, out of range, and in the page about it."""

import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.commands.field_help import FieldHelp, describe, page, terminal_lines
from pipeline import recipes
from pipeline.configuration import convert, to_dict
from pipeline.data.sources.cards import Card
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.field_types import Items, Range
from pipeline.models.backbone import OPTION_TYPES
from pipeline.training.run import Run, dump_yaml, load_yaml, override
from transfer.protocol.methods import METHOD_KINDS
from transfer.protocol.suite_files import SuiteFile
from transfer.protocol.tasks import TaskEntry

BASE = override(recipes.get("nfnet_tiny_glyphs"), {"optim.learning_rate": "0.5"})
RUN = list(describe(Run))
OTHERS = [
    *(f for kind in (SuiteFile, TaskEntry, Card) for f in describe(kind)),
    *(f for kind in dict.fromkeys(kind for kind, *_ in METHOD_KINDS.values()) for f in describe(kind)),
    *(FieldHelp(f"model.options.{name}", hint, "", "x") for name, hint in OPTION_TYPES.items()),
]
TEXTS = {
    "data.mixture": "other=0.5",
    "data.skip_steps": "1:2",
    "optim.rate_scales": "stem=0.5",
    "optim.schedule": "steps",
    "augment.crop": "none",
}
NEEDS = {
    **{f"engine.checkpointed_{name}": {"engine.activation_checkpointing": "true"} for name in ("share", "every")},
    "engine.cuda_graphs": {"engine.compile": "network"},
    "optim.schedule": {"optim.decay_steps": "64"},
    "optim.decay_steps": {"optim.schedule": "steps"},
    "augment.resized_px": {"augment.crop": "resized"},
    **{f"data.{part}.{name}": {f"data.{part}.per_class": "64"} for part in ("subset", "eval_subset")
       for name in ("seed", "holdout_per_class", "part", "holdout_share", "listed")},
}  # fmt: skip


def parts(hint: Any) -> tuple[Any, list[Any]]:
    """The type that is not None, and what it is annotated with."""
    marks: list[Any] = []
    while typing.get_origin(hint) in (typing.Annotated, typing.Union, types.UnionType):
        if typing.get_origin(hint) is typing.Annotated:
            marks, hint = [*hint.__metadata__, *marks], hint.__origin__
        else:
            hint = next(o for o in typing.get_args(hint) if o is not type(None))
    return hint, marks


def sample(hint: Any) -> str:
    """Text that the type takes."""
    kind, marks = parts(hint)
    if typing.get_origin(kind) is typing.Literal:
        return str(typing.get_args(kind)[-1])
    if typing.get_origin(kind) in (tuple, list):
        count = next((m.count for m in marks if isinstance(m, Items) and m.count), 1)
        return ",".join([sample(typing.get_args(kind)[0])] * count)
    low = next((m.low or 0 for m in marks if isinstance(m, Range)), 0)
    return {bool: "true", int: "64", float: str(low + 0.5), Duration: "7 steps", str: "some"}[kind]


def wrong(hint: Any) -> list[Any]:
    """Values that it does not."""
    kind, marks = parts(hint)
    if typing.get_origin(kind) in (tuple, list):
        return [[value] for value in wrong(typing.get_args(kind)[0])] + [True, {"a": 1}]
    if typing.get_origin(kind) is typing.Literal or kind is bool:
        return ["maybe", 7, 0.5]
    if kind is str:
        return [7, True, ["a"]]
    if kind is Duration:
        return (
            ["7", "weeks", "-7 steps", "nan steps", "7 weeks", 7, True, None]
            if hint is Duration
            else ["7", "7 weeks", 7]
        )
    found: list[Any] = ["many", "", "nan", math.nan, math.inf, "1e999", True, [1, 2], {}]
    found += ["1.5", 1.5, "9" * 6000] if kind is int else []
    for end in (m for m in marks if isinstance(m, Range)):
        found += [] if end.low is None else [end.low - 1, str(end.low - 1), end.low - 1e-9]
        found += [] if end.high is None else [end.high + 1, str(end.high + 1)]
        found += [end.low] if end.without in ("low", "both") else []
        found += [end.high] if end.without in ("high", "both") else []
    return found


def value_at(run: Run, path: str) -> Any:
    found: Any = run
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@pytest.mark.parametrize("field", RUN, ids=lambda f: f.path)
def test_each_field_of_a_run_by_command_line_and_by_yaml(field: FieldHelp) -> None:
    if field.path == "model.options":
        given, text = {"model.options.drop_rate": "0.5"}, "{drop_rate: 0.5}"
    else:
        text = TEXTS.get(field.path) or sample(field.hint)
        given = {field.path: text, **NEEDS.get(field.path, {})}
    if field.path == "engine.cpu_offload":
        with pytest.raises(UserError, match=r"engine\.cpu_offload"):
            override(BASE, given)
        return
    by_words = override(BASE, given)
    assert by_words != BASE or text == str(to_dict(value_at(BASE, field.path))).lower()
    assert load_yaml(dump_yaml(by_words), "run.yaml") == by_words
    plain = yaml.safe_load(text) if field.path not in TEXTS else text
    value = convert(field.hint, plain, field.path)
    found = value_at(by_words, field.path)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("field", [*RUN, *OTHERS], ids=lambda f: f.path)
def test_each_field_refuses_what_it_does_not_take_and_says_what_it_takes(field: FieldHelp) -> None:
    kind, _ = parts(field.hint)
    if kind is Any or typing.get_origin(kind) in (dict, Mapping):
        return
    for value in wrong(field.hint):
        with pytest.raises(UserError) as refused:
            convert(field.hint, value, field.path)
        text = str(refused.value)
        assert (
            text.startswith(field.path)
            and ("; set " in text or "write a number and a unit" in text)
            and len(text) < 500
        )


def test_the_page_is_current_and_every_field_of_a_run_has_its_words() -> None:
    file = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert file.read_text() == page(), "run: python -m orchestration.commands.field_help > docs/configuration.md"
    assert [f.path for f in RUN if not f.help] == []
    shown = "\n".join(terminal_lines(BASE))
    assert "--optim.learning_rate  (0.5)" in shown and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        ("watchdog.limit_s", "30 minutes", 1800.0), ("watchdog.limit_s", "90", 90.0), ("watchdog.limit_s", "1.5h", 5400.0),
        ("data.read_ahead_mb", "2 GB", 2000.0), ("data.cache_gb", "500 MB", 0.5), ("data.block_mb", "1 MiB", 1.048576),
        ("global_batch", "1e3", 1000), ("optim.weight_decay", "1e-5", 1e-5), ("augment.std", "[0.5, 0.5, 0.5]", (0.5,) * 3),
        ("optim.decay_steps", "none", ()), ("optim.ema_decay", "None", None), ("seed", str(2**63 - 1), 2**63 - 1),
    ],
)  # fmt: skip
def test_units_powers_and_lists(hint: str, text: str, value: Any) -> None:
    field = next(f for f in RUN if f.path == hint)
    found = convert(field.hint, text, field.path)
    assert found == value and type(found) is type(value)
