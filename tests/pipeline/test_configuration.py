"""The Run: one description, strict, round trip."""

import dataclasses
import re
from typing import Any, Literal

import pytest

import nfnet
from pipeline import recipes
from pipeline.configuration import convert, dataclass_of, expected, from_dict, to_dict
from pipeline.data.sampling.subset import Subset
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.field_types import Count, PositiveDuration, Seconds
from pipeline.training.run import Run, dump_yaml, load_yaml, override

RUN = recipes.get("nfnet_tiny_glyphs")


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_survives_the_round_trip(name: str) -> None:
    run = recipes.get(name)
    assert load_yaml(dump_yaml(run), name) == run
    assert run.batch_plan(1)[0] * run.batch_plan(1)[1] == run.global_batch


def test_equal_runs_have_equal_digests_and_others_do_not() -> None:
    assert from_dict(Run, to_dict(RUN)).digest() == RUN.digest()
    assert override(RUN, {"optim.weight_decay": "1e-9"}).digest() != RUN.digest()


def test_an_override_reaches_the_field_with_its_type() -> None:
    run = override(
        RUN,
        {"optim.learning_rate": "0.25", "augment.flip": "true", "augment.mean": "0.5,0.5,0.5", "eval_every": "none",
         "duration": "7 steps", "model.options.drop_rate": 0.5, "data.subset.per_class": "5"},
    )  # fmt: skip
    assert run.optim.learning_rate == 0.25 and run.augment.flip is True and run.augment.mean == (0.5, 0.5, 0.5)
    assert run.eval_every is None and run.duration == Duration(7, "steps")
    assert run.model.options["drop_rate"] == 0.5 and run.data.subset is not None and run.data.subset.per_class == 5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.learning_rat", "1", "did you mean 'learning_rate'"),
        ("optm.learning_rate", "1", "did you mean 'optim'"),
        ("seed", "x", "seed is 'x'; set a whole number of 0 or more"),
        ("optim.learning_rate", "fast", "set a number above 0"),
        ("optim.learning_rate", "-1", "set a number above 0"),
        ("engine.zero_stage", "4", "set one of 0, 1, 2, 3"),
        ("duration", "10", "write a number and a unit"),
        ("duration", "10 weeks", "write a number and a unit"),
        ("global_batch", "0", "set a whole number of 1 or more"),
        ("augment.flip", "maybe", "set true or false"),
        ("seed.x", "1", "has no fields of its own"),
    ],
)
def test_a_wrong_field_or_value_is_refused_with_what_to_change(field: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(RUN, {field: value})


def test_values_from_python_meet_the_ranges_that_text_meets() -> None:
    with pytest.raises(UserError, match="learning_rate is -1"):
        dataclasses.replace(RUN.optim, learning_rate=-1.0)
    with pytest.raises(UserError, match="seed is"):
        dataclasses.replace(RUN, seed="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (bool, "False", False),
        (bool, "true", True),
        (int | None, "null", None),
        (int | None, "None", None),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (tuple[int, ...], "1,2", (1, 2)),
        (tuple[int, ...], "null", ()),
        (tuple[int, ...], "none", ()),
        (tuple[int, ...], " ", ()),
        (tuple[int, ...], 3, (3,)),
        (dict[str, int], {"a": "1"}, {"a": 1}),
    ],
)
def test_text_becomes_what_the_type_takes(kind: Any, value: Any, found: Any) -> None:
    converted = convert(kind, value, "x")
    assert converted == found and type(converted) is type(found)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (dict[str, int], [1], r"x is \[1\]; set a mapping of name to a whole number"),
        (tuple[int, ...], True, "x is True; set a list of numbers, each a whole number"),
        (tuple[str, ...], {}, "set a list of values, each text"),
        (Literal["adamw", "lion"], "adam", "did you mean 'adamw'"),
        (Literal["adamw", "lion"], "sgd", "set one of adamw, lion$"),
        (str, 5, "put it in quotes"),
    ],
)
def test_what_a_type_does_not_take_is_refused_in_its_words(kind: Any, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        convert(kind, value, "x")


def test_what_is_no_mapping_or_lacks_a_field_is_said_with_its_place() -> None:
    for data, path, words in (
        ([1], "", r"^the configuration is \[1\]; set a mapping"),
        ("x", "optim", "^optim is 'x'; set a mapping"),
        ({}, "run", "^run lacks .*; set it"),
    ):
        with pytest.raises(UserError, match=words):
            from_dict(Run, data, path)
    assert to_dict({"kind": Run, "runs": (Duration(3, "steps"),)}) == {"kind": Run, "runs": ["3 steps"]}
    assert dataclass_of(Subset | None) is Subset and dataclass_of(Duration) is dataclass_of(int) is None


def test_whole_numbers_may_have_an_exponent_and_stay_whole_and_other_numbers_stay_broken() -> None:
    assert convert(int, "1e6", "x") == 1_000_000 and type(convert(int, "1e6", "x")) is int
    assert type(convert(float, 1, "x")) is float and convert(int, str(2**63 - 1), "x") == 2**63 - 1
    for value in ("1.5", str(2**63), "1e19", True):
        with pytest.raises(UserError, match="set a whole number"):
            convert(int, value, "x")


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (str, "text"),
        (float | None, "a number, or none"),
        (int | str, "a whole number, or text"),
        (Seconds, "a number of 0 or more, in seconds or with a unit"),
        (PositiveDuration, "a number above 0 and a unit, as '20 epochs', '500 steps' or '1e6 samples'"),
    ],
)
def test_what_a_field_takes_is_said_in_words(hint: Any, words: str) -> None:
    assert expected(hint) == words


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (tuple[str, ...], "values, each text"),
        (tuple[int, ...], "numbers, each a whole number"),
        (dict[str, int], "a mapping of name to a whole number"),
    ],
)
def test_what_a_list_or_a_mapping_takes_is_said_in_words(hint: Any, words: str) -> None:
    assert expected(hint).endswith(words)


def test_a_lone_number_is_a_list_of_one_and_what_is_no_list_is_refused() -> None:
    assert convert(tuple[float, ...], 0.5, "x") == (0.5,)
    assert convert(list[int], 3, "x") == [3] and convert(list[int], "none", "x") == []
    for value in (True, {"a": 1}, {1}, b"1"):
        with pytest.raises(UserError, match=r"^x is .*; set "):
            convert(list[int], value, "x")


def test_a_unit_is_read_where_the_field_has_one_and_only_there() -> None:
    assert convert(Seconds, "2 minutes", "x") == 120.0 and convert(Seconds, " 3 ", "x") == 3.0
    assert convert(Count, "80", "x") == 80  # a range is a mark of the type as a unit is, and is none
    for hint, value in ((Count, "80 s"), (Seconds, "2 parsecs"), (Seconds, "-2 minutes"), (Seconds, "seconds 2")):
        with pytest.raises(UserError, match=r"^x is "):
            convert(hint, value, "x")


def test_a_nested_field_is_named_with_its_path_and_a_long_value_is_cut() -> None:
    with pytest.raises(UserError, match=r"^optim\.momentum is "):
        from_dict(Run, to_dict(RUN) | {"optim": to_dict(RUN.optim) | {"momentum": "x"}})
    for length, shown in ((118, "'" + "a" * 118 + "'"), (119, "'" + "a" * 99 + "... (121 characters)")):
        with pytest.raises(UserError, match=re.escape(f"x is {shown}; set")):
            convert(int, "a" * length, "x")


def test_only_text_is_advised_to_stand_in_quotes() -> None:
    with pytest.raises(UserError, match=r"set text \(put it in quotes\)$"):
        convert(str, 5, "x")
    with pytest.raises(UserError, match=r"set a whole number$"):
        convert(int, [], "x")


def test_options_of_a_network_have_its_types_from_text_and_from_yaml() -> None:
    texts = {
        "drop_rate": "0.3",
        "ws_eps": "1e-5",
        "beta_first": "true",
        "width_divisor": "8",
        "activation": "silu",
        "skip_init": "none",
    }
    typed = {
        "drop_rate": 0.3,
        "ws_eps": 1e-5,
        "beta_first": True,
        "width_divisor": 8,
        "activation": "silu",
        "skip_init": None,
    }
    run = override(RUN, {f"model.options.{name}": text for name, text in texts.items()})
    assert run.model.options == typed and load_yaml(dump_yaml(run), "x") == run
    nfnet.create_model("nfnet_tiny", 2, **run.model.options)
    theirs = {
        "drop_path_rate": "0.1",
        "img_size": "[64, 64]",
        "depth": "2",
        "qkv_bias": "false",
        "act_layer": "gelu",
        "norm": "none",
    }
    peer = override(RUN, {"model.name": "timm:x", **{f"model.options.{name}": text for name, text in theirs.items()}})
    assert list(peer.model.options.values()) == [0.1, [64, 64], 2, False, "gelu", None]
    with pytest.raises(UserError, match=r"model\.options has no 'drop_rat'; did you mean 'drop_rate'"):
        override(RUN, {"model.options.drop_rat": "1"})


def test_an_unknown_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'nfnet_tiny_glyphs'"):
        recipes.get("nfnet_tiny_glyph")


@pytest.mark.parametrize(("ranks", "micro", "plan"), [(1, 0, (128, 1)), (2, 0, (64, 1)), (2, 16, (16, 4))])
def test_the_parts_of_a_batch_multiply_to_the_whole(ranks: int, micro: int, plan: tuple[int, int]) -> None:
    assert dataclasses.replace(RUN, micro_batch=micro).batch_plan(ranks) == plan


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="128 does not divide over 3 processes"):
        RUN.batch_plan(3)
    with pytest.raises(UserError, match="micro_batch 48 does not divide the 64"):
        dataclasses.replace(RUN, micro_batch=48).batch_plan(2)


@pytest.mark.parametrize(
    ("text", "steps"), [("2 epochs", 20), ("1 epoch", 10), ("500 samples", 5), ("7 steps", 7), ("0.01 epochs", 1)]
)
def test_durations_resolve_to_steps(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(samples_per_epoch=1000, global_batch=100) == steps


def test_yaml_that_is_none_says_where() -> None:
    with pytest.raises(UserError, match=r"run\.yaml is not usable as YAML"):
        load_yaml("a: [", "run.yaml")
