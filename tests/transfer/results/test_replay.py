"""Decisions on candidates, played again: those that hold do, and each way of changing one is seen."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.transfer.records import sweep_json
from tests.transfer.search import test_optuna_search as by_model
from tests.transfer.sweep import test_scheduler as by_halving
from tests.transfer.sweep.test_scheduler import SOURCE
from transfer.protocol.search_space import Axis
from transfer.protocol.tasks import Suite, TaskEntry
from transfer.report.html_search import search_table
from transfer.report.write_report import write_report
from transfer.results.replay import Played, play_again
from transfer.results.rerun import rerun
from transfer.results.search_effects import range_effects, whole_candidates
from transfer.results.sweep_results import Findings, load_findings
from transfer.search import optuna_search, successive_halving
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.ledger import Ledger


@pytest.fixture()
def searched(digits: str, tmp_path: Path) -> Sweep:
    tasks = (TaskEntry(card="digits", holdout_per_class=10),)
    suite = Suite(name="s", title="s", tasks=tasks, methods=(by_model.METHOD,), num_seeds=2)
    out = str(tmp_path / "searched")
    sweep = Sweep(out=out, data_root=str(Path(digits).parent), sources=(SOURCE,), suite=suite)
    by_model.shuffled(sweep, seed=0, at_a_time=4)
    return sweep


@pytest.fixture()
def halved(digits: str, tmp_path: Path) -> Sweep:
    sweep = Sweep(
        out="", data_root=str(Path(digits).parent), sources=(SOURCE,), suite=by_halving.SUITE, scheduler="halving"
    )
    sweep = by_halving.halving(sweep, tmp_path / "halved")
    by_halving.shuffled(sweep, seed=0)
    return sweep


def played(sweep: Sweep, cell: str = "") -> Played:
    return play_again(
        sweep.out, {e.digest: e for e in Ledger(sweep.out).entries()}, sweep.plain()["suite"]["methods"], cell
    )


def change(sweep: Sweep, pattern: str, edit: Callable[[dict[str, Any]], Any]) -> str:
    """Edit the last file under decisions/ of that pattern; its name."""
    path = sorted(Path(sweep.out, "decisions").glob(pattern))[-1]
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path.stem


def test_decisions_of_both_kinds_hold_for_a_sweep_or_one_of_its_cells(searched: Sweep, halved: Sweep) -> None:
    assert played(searched) == played(halved) == Played(2 * 4)  # four generations; two rungs of two brackets
    for sweep in (searched, halved):
        assert played(sweep, plan(sweep)[0][0].name) == Played(4)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda c: c["points"][0].update(learning_rate=0.1), "other points are asked for"),
        (lambda c: c["rows"][0].update(score=0.99), "in the ledger"),
        (lambda c: c["rows"].pop(0), "not what was asked before"),
        (lambda c: c["search"].update(seed=1), "another search"),
    ],
)
def test_a_generation_that_was_changed_is_named(
    edit: Callable[[dict[str, Any]], Any], problem: str, searched: Sweep
) -> None:
    name = change(searched, "*-generation-3.json", edit)
    (line,) = played(searched).wrong
    assert name in line and problem in line


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda c: c["kept"].append(99), "others go on"),
        (lambda c: [row.update(score=row["score"] + 0.5) for row in c["rows"]], "and it says"),
    ],
)
def test_a_rungs_decision_that_was_changed_is_named(
    edit: Callable[[dict[str, Any]], Any], problem: str, halved: Sweep
) -> None:
    name = change(halved, "*-0-10.json", edit)
    (line,) = played(halved).wrong
    assert name in line and problem in line


def test_another_version_of_the_library_is_said_and_not_held_against_a_decision(
    searched: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_search, "library", lambda: "optuna 99.0")
    found = played(searched)
    assert (found.num, found.wrong) == (0, ()) and len(found.not_played) == 1 and "optuna 99.0" in found.not_played[0]


def test_what_mattered_of_a_range_is_seen_in_its_thirds() -> None:
    axes = (Axis(name="a", low=0, high=1, scale="linear"), Axis(name="b", low=1, high=100, scale="log"))
    scores = [({"a": i / 8, "b": i % 3 * 3 + i // 3}, 0.1 * (i // 3)) for i in range(9)]
    assert range_effects(scores, axes) == pytest.approx({"a": 0.2, "b": 0.0})
    assert list(range_effects(scores, axes[::-1])) == ["a", "b"] and range_effects(scores[:5], axes) == {}


@pytest.mark.usefixtures("stand_ins")
def test_the_report_and_a_cell_that_is_run_again_say_which_decision_does_not_hold(
    digits_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(digits_sweep, tmp_path / "s")
    folder = load_findings(copy).folders[0]
    cell = next(name for name in folder.selections if name.startswith("digits-knn-scratch-5"))
    row = {"digest": "d", "loss": 1.0}
    rows = [{"index": 0, "score": 0.5, **row}, {"index": 1, "score": 0.7, **row}]
    decision = successive_halving.Decision(cell=cell, bracket=0, step=9, scheduler="halving", rows=rows, kept=[1])
    Path(copy, "decisions").mkdir()
    for kept, said in (([1], "it holds"), ([0], "0 hold")):
        content = dataclasses.asdict(dataclasses.replace(decision, kept=kept))
        Path(copy, "decisions", f"{cell}-0-9.json").write_text(json.dumps(content))
        paths = write_report(copy, tmp_path / "report")
        line = f"the decision {cell}-0-9 does not hold"
        page, printed = Path(paths["html"]).read_text(), capsys.readouterr().out
        assert f"played again from what is written down: {said}." in page
        again = rerun(load_findings(copy).folders[0], cell).differences
        assert [line in text for text in (page, printed, " ".join(again))] == [kept == [0]] * 3


def test_the_page_shows_a_search_by_a_model_trial_by_trial_and_over_its_ranges(searched: Sweep) -> None:
    Path(searched.out, "sweep.json").write_text(sweep_json(plan=searched.plain()))
    findings = load_findings(searched.out)
    text = search_table(findings)
    assert text.count("<figure") == 1 and "played again from what is written down: all hold" in text
    assert 'aria-label="Candidates of a search over learning_rate, num_steps, weight_decay"' in text
    assert re.findall(r">(\d+) of 14<", text) == [
        str(len(whole_candidates(findings.selection(cell))[1])) for cell in _cells(findings)
    ]
    for word in ("learning rate", "num steps", "weight decay", "0.01", "1e-5"):  # axes, and ticks of logarithmic ones
        assert f">{word}<" in text


def _cells(findings: Findings) -> list[LedgerEntry]:
    """A trial of each start, pretrained first."""
    return [next(e for e in findings.cells if e.init == init) for init in ("pretrained", "scratch")]
