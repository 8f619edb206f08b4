"""Whatever is wrong in a YAML file is refused with its line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import recipes
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from pipeline.planning import scaling
from pipeline.training.run import dump_yaml, load_yaml, override
from pipeline.yaml_files.refusals import line_of
from transfer.lab.experiment import load_experiment
from transfer.protocol.suite_files import load_suite

SUITE = """# of ours
name: mine
tasks:
- digits
- {card: mnist,
   holdout_per_class: 2}
methods:
  ridge: {shots: [5, 1]}
  finetune:
    shots: [5]
    search:
      num_trials: 16
      learning_rate: [0.003, 3.0]
      num_steps: [20, 120]
"""
CARD = """name: mine
title: Mine
kind: folder
num_classes: 2
splits: {train: 10, val: 2}
image_size: any
metric: top1
flip: true
licence: own
citation: none
source_hint: a folder
classes:
- cat
- dog
"""
EXPERIMENT = """name: mine
methods:
- batch_norm
- normalizer_free
epochs: 2
compare:
- high: {method: batch_norm}
  low: {method: normalizer_free}
tiny:
  epochs: 1
"""
RUNS = """- {name: a, parameters: 1.0e6, epochs: 1, loss: 2.0}
- name: b
  parameters: 2.0e6
  epochs: 1
  loss: 1.5
"""


def refusal(read: Callable[[str], object], text: str, folder: Path) -> str:
    path = folder / "f.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as found:
        read(str(path))
    return str(found.value).replace(str(path), "F")


@pytest.mark.parametrize(
    ("old", "new", "start"),
    [
        ("tasks:", "task:", "the suite F, line 3: no field 'task'; did you mean 'tasks'?"),
        ("- digits", "- digitz", "the suite F, line 4: tasks[0].card: no dataset card is called 'digitz'"),
        ("_per_class: 2", "_per_class: x", "the suite F, line 6: tasks[1].holdout_per_class is 'x'; set a whole number"),
        ("card: mnist", "kard: mnist", "the suite F, line 5: no field 'tasks[1].kard'; did you mean 'card'?"),
        ("card: mnist", "label: mnist", "the suite F, line 5: tasks[1] lacks card; set it"),
        ("card: mnist", "card: digits", "the suite F, line 5: tasks[1] is the task digits again; leave it out"),
        ("ridge:", "rigde:", "the suite F, line 8: no method is called 'rigde'; did you mean 'ridge'?"),
        ("[5, 1]", "[5, 5]", "the suite F, line 8: methods.ridge: shots is [5, 5]; set a list of different numbers"),
        ("    shots: [5]\n", "", "the suite F, line 9: methods.finetune: shots are for the split rule few_shot"),
        ("16", "16\n      sampler: tpee", "the suite F, line 13: methods.finetune: search.sampler is 'tpee'; set one of"),
        ("120]", "12]", "the suite F, line 14: methods.finetune: the search's num_steps runs from 20 to 12"),
        (SUITE, "[digits]\n", "the suite F, line 1: the configuration is ['digits']; set a mapping of field to value"),
        (SUITE[SUITE.index("tasks") : SUITE.index("methods")], "tasks: digits\n", "the suite F, line 3: tasks is 'digits'; "
         "set a list of values, each text, or a mapping of name to a value, in brackets: [digits]"),
    ],
)  # fmt: skip
def test_a_suite_is_refused_with_the_line(old: str, new: str, start: str, tmp_path: Path) -> None:
    assert refusal(load_suite, SUITE.replace(old, new), tmp_path).startswith(start)


@pytest.mark.parametrize(
    ("read", "text", "old", "new", "start"),
    [
        (load_card, CARD, "top1", "top2", "the dataset card F, line 7: metric is 'top2'; set one of"),
        (load_card, CARD, "- dog", "- cat", "the dataset card F, line 12: classes is ['cat', 'cat']; set a list of"),
        (load_card, CARD, "- dog\n", "", "the dataset card F, line 12: classes has 1 names and num_classes is 2"),
        (load_card, CARD, "flip: true\n", "", "the dataset card F, line 1: the configuration lacks flip; set it"),
        (load_experiment, EXPERIMENT, "- batch_norm", "- batch_nrm", "the experiment F, line 3: methods[batch_nrm]: no method"),
        (load_experiment, EXPERIMENT, "  low:", "  lov:", "the experiment F, line 8: no field 'compare[0].lov'"),
        (load_experiment, EXPERIMENT, "epochs: 1", "epoch: 1", "the experiment F, line 10: no field 'tiny.epoch'"),
        (scaling.read, RUNS, "loss: 1.5", "loss: x", "F, line 5 is not usable: at [1].loss: it needs a number and has text"),
        (scaling.read, RUNS, "  loss: 1.5\n", "", "F, line 2 is not usable: at [1]: it lacks 'loss'"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_the_line(
    read: Callable[[str], object], text: str, old: str, new: str, start: str, tmp_path: Path
) -> None:
    assert refusal(read, text.replace(old, new), tmp_path).startswith(start)


def test_a_run_is_refused_with_the_line_of_the_field_and_nothing_is_guessed() -> None:
    text = dump_yaml(recipes.get("nfnet_tiny_glyphs"))
    number = text.splitlines().index("global_batch: 128") + 1
    with pytest.raises(UserError, match=rf"^r\.yaml, line {number}: global_batch is 0; set"):
        load_yaml(text.replace("global_batch: 128", "global_batch: 0"), "r.yaml")
    number = next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith("  final_learning_rate"))
    with pytest.raises(UserError, match=rf"^r\.yaml, line {number}: optim\.final_learning_rate is 9, above"):
        load_yaml(text.replace("  final_learning_rate: 0.0", "  final_learning_rate: 9"), "r.yaml")
    number = next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith("duration:"))
    with pytest.raises(UserError, match=rf"^r\.yaml, line {number}: duration is '3 weeks'"):
        load_yaml(text.replace(text.splitlines()[number - 1], "duration: 3 weeks"), "r.yaml")
    with pytest.raises(
        UserError, match=r"^r\.yaml: the configuration holds a URL with credentials"
    ):  # nobody says where
        load_yaml(text.replace("url: ''", "url: s3://k:v@b/x"), "r.yaml")


def test_a_card_that_a_suite_names_is_refused_with_its_own_line(tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(CARD.replace("top1", "top2"))
    found = refusal(load_suite, SUITE.replace("- digits", f"- {tmp_path}/card.yaml"), tmp_path)
    assert found.startswith(
        f"the suite F, line 4: tasks[0].card: the dataset card {tmp_path}/card.yaml, line 7: metric is"
    )


@pytest.mark.parametrize(
    ("text", "place", "line"),
    [
        ("a: 1\nb.c: 2\nb: {c: 3}", "b.c", 2),
        ("a: &x\n  p: 1\nb:\n  <<: *x\n  q: 2", "b.p", 2),
        ("a:\n- 1\n-  x: 2", "a[1].x.y", 3),
        ("a:\n- 1", "a[7]", 1),
        ("# only\n\na: 1", "", 3),
        ("", "a", None),
        ("a: [", "a", None),
    ],
)
def test_the_line_of_a_place(text: str, place: str, line: int | None) -> None:
    assert line_of(text, place) == line == line_of(text.encode(), place)


def test_text_is_a_list_on_the_command_line_and_in_no_document() -> None:
    run = recipes.get("nfnet_tiny_glyphs")
    assert override(run, {"optim.unclipped": "stem,head"}).optim.unclipped == ("stem", "head")
    text = dump_yaml(run).replace("  unclipped:", "  unclipped: stem,head\n  #")
    with pytest.raises(
        UserError, match=r"line \d+: optim\.unclipped is 'stem,head'; set a list .*in brackets: \[stem,head\]$"
    ):
        load_yaml(text, "r.yaml")
