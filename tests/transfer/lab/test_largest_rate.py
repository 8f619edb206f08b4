"""The bisection of rates: against thresholds that are known, whatever was run before, and from the ledgers of its rounds."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from transfer.lab.build import Line, lines_of
from transfer.lab.experiment import Comparison, Experiment, RateSearch
from transfer.lab.largest_rate import Bisection, bracket, is_stable, next_rates
from transfer.lab.page import cells_of
from transfer.lab.table import LabRow
from transfer.lab.verdict import judge
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.ledger import Ledger

SEARCH = RateSearch(low=0.1, high=25.6, halvings=6)
ASKED = Experiment(name="rates", methods=("none", "batch_norm"), seeds=2, rates=(0.1, 0.2), each_rate=True)


@pytest.mark.parametrize("threshold", [0.11, 0.8, 3.0, 25.0])
def test_the_bracket_holds_the_threshold_and_is_as_narrow_as_its_halvings_say(threshold: float) -> None:
    known: dict[float, bool | None] = {}
    while rates := next_rates(SEARCH, known):
        known |= {rate: rate < threshold for rate in rates}
    found = bracket(SEARCH, known)
    assert found.stable is not None and found.unstable is not None
    assert found.stable < threshold <= found.unstable
    assert math.log2(found.unstable / found.stable) == pytest.approx(8 / 2**6, rel=0.02)  # of 8 octaves
    assert len(known) == 2 + SEARCH.halvings


def test_bounds_that_do_not_hold_end_it_and_are_said() -> None:
    assert next_rates(SEARCH, {0.1: True, 25.6: True}) == next_rates(SEARCH, {0.1: False, 25.6: False}) == []
    assert bracket(SEARCH, {0.1: True, 25.6: True}).text == "25.6 or more"
    assert bracket(SEARCH, {0.1: False, 25.6: False}).text == "below 0.1"
    assert next_rates(SEARCH, {0.1: True, 25.6: None}) == []  # a trial without a result
    with pytest.raises(UserError, match="set low below high"):
        RateSearch(low=2.0, high=1.0)


THRESHOLDS = {"none": 0.5, "batch_norm": 6.0}


def run(sweep: Sweep, limit: int = 1000) -> None:
    """Stands in for trials: those above the method's threshold diverge."""
    ledger = Ledger(sweep.out)
    for cell in plan(sweep)[0]:
        for trial in cell.finals(dict(cell.points[0]), sweep.suite.num_seeds):
            if limit and not ledger.is_done(trial):
                limit -= 1
                name = sweep.source_of(trial).name.partition(" ")[0]
                bad = trial.hyperparameters["learning_rate"] >= THRESHOLDS[name]
                found = sweep.entry(trial, value=None if bad else 0.2, measures={} if bad else {"train_loss": 1.0})
                ledger.write(found)


def bisected(digits: str, out: Path) -> Bisection:
    made = Bisection(ASKED, SEARCH, digits, str(out))
    while (found := made.next_round()) is not None:
        run(found[0])
        made.learn(*found)
    return made


def test_rounds_are_ordinary_sweeps_and_the_same_again_reads_them(digits: str, tmp_path: Path) -> None:
    made = bisected(digits, tmp_path)
    for name, threshold in THRESHOLDS.items():
        known = next(k for (word, *_), k in made.known.items() if word == name)
        found = bracket(SEARCH, known)
        assert (found.stable or 0) < threshold <= (found.unstable or 0)
    rounds = sorted(p.name[:7] for p in (tmp_path / "largest_rate").iterdir())
    assert rounds == [f"round-{i}" for i in range(1 + SEARCH.halvings)]
    trials = [p for p in (tmp_path / "largest_rate").rglob("*.json") if p.parent.name == "trials"]
    assert len(trials) == 2 * ASKED.seeds * (2 + SEARCH.halvings)
    before = {p: p.stat().st_mtime_ns for p in trials}
    assert bisected(digits, tmp_path).known == made.known
    assert {p: p.stat().st_mtime_ns for p in trials} == before
    rows = made.enter([LabRow(line=line) for line in lines_of(ASKED)])
    assert len(rows) == 4 and {cells_of(row)[-1] for row in rows if row.line.word == "none"} == {rows[0].largest.text}  # type: ignore[union-attr]
    sides: dict[str, Any] = {"high": {"method": "batch_norm", "rate": 0.1}, "low": {"method": "none", "rate": 0.1}}
    comparison = Comparison(**sides, statistic="largest_rate")
    assert judge(comparison, rows).word == "passes"
    assert judge(replace(comparison, high=comparison.low, low=comparison.high), rows).word == "fails"
    assert judge(replace(comparison, low=comparison.high), rows).word == "unclear"
    assert judge(comparison, [replace(row, largest=None) for row in rows]).word == "unclear"


def test_a_round_that_lacks_a_result_ends_its_line_until_the_same_command_has_it(digits: str, tmp_path: Path) -> None:
    made = Bisection(ASKED, SEARCH, digits, str(tmp_path))
    first = made.next_round()
    assert first is not None
    run(first[0], limit=1)
    made.learn(*first)
    assert made.lacks_result
    assert not bisected(digits, tmp_path).lacks_result


def test_a_rate_is_stable_where_every_seed_ends_below_twice_the_loss_of_guessing() -> None:
    (line,) = lines_of(replace(ASKED, methods=("none",), each_rate=False))

    def of(*losses: float | None) -> bool | None:
        return is_stable(_row(line, losses), limit=2 * math.log(10), num_seeds=2)

    assert of(1.0, 4.0) is True and of(1.0, 5.0) is False and of(1.0, None) is False and of(1.0) is None


def _row(line: Line, losses: tuple[float | None, ...]) -> LabRow:
    from tests.transfer.lab.test_lab import entry

    entries = [
        entry(i, None if x is None else 0.3, **({} if x is None else {"train_loss": x})) for i, x in enumerate(losses)
    ]
    return LabRow(line=line, entries=entries)
