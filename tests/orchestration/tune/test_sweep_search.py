"""A search by a model with real trials under Ray Tune: equal for any number at a time and after a kill, and its page."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.orchestration.tune.test_sweep import Runner, checkpoint_dir  # noqa: F401
from tests.transfer.sweep.test_scheduler import SOURCE
from transfer.protocol.methods import parse_methods
from transfer.protocol.sealed_splits import openings, read_selection
from transfer.protocol.tasks import Suite, TaskEntry
from transfer.report.write_report import write_report
from transfer.results.sweep_results import load_findings, played
from transfer.search.optuna_search import written
from transfer.search.successive_halving import read_asha
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.ledger import Ledger

SUITE = """
name: searched
tasks: [{card: digits, holdout_per_class: 4}]
num_seeds: 1
methods:
  finetune:
    shots: [2]
    search: {num_trials: 7, num_parallel: 3, num_random: 3, learning_rate: [0.01, 100.0], num_steps: [2, 8], drop_rate: [0, 0.5]}
"""


def asked(runner: Runner) -> dict[str, list[object]]:
    found = {}
    for name in sorted(p.stem for p in (runner.out / "selection").iterdir()):
        found[name] = [dataclasses.replace(g, time_s=0.0) for g in written(str(runner.out), name)]
    return found  # type: ignore[return-value]


def test_asha_leaves_the_points_of_a_model_alone(digits: str, tmp_path: Path) -> None:
    from orchestration.tune.asha import CellwiseAsha

    methods = parse_methods(
        {
            **yaml.safe_load(SUITE)["methods"],
            "grid": {"kind": "finetune", "shots": [2], "learning_rates": [1, 2], "num_steps": [9]},
        },
        "x",
    )
    suite = Suite(
        name="s", title="s", tasks=(TaskEntry(card="digits", holdout_per_class=4),), methods=methods, num_seeds=1
    )
    sweep = Sweep(
        out=str(tmp_path), data_root=str(Path(digits).parent), sources=(SOURCE,), suite=suite, scheduler="asha"
    )
    cells = plan(sweep)[0]
    asha = CellwiseAsha(sweep, cells)
    for index, cell in enumerate(cells):
        searched = cell.space is not None
        for number, score in enumerate((0.9, 0.1, 0.1)):
            point = {"learning_rate": 1.0, "num_steps": 9}
            job = {
                "cell": index,
                "trial": dataclasses.asdict(dataclasses.replace(cell.any_trial, hyperparameters=point)),
            }
            trial = SimpleNamespace(config=job, trial_id=f"{index}-{number}", last_result={})
            asha.on_trial_add(None, trial)
            verdict = asha.on_trial_result(None, trial, {"step": 4, "accuracy": score})
        assert (verdict == "CONTINUE") is searched
        assert bool(read_asha(sweep.out, cell.name)) is not searched


@pytest.mark.slow
def test_real_trials_give_one_search_however_many_at_a_time_and_after_a_kill(
    checkpoint_dir: Path,  # noqa: F811
    digits: str,
    tmp_path: Path,
) -> None:
    one = Runner(checkpoint_dir, digits, tmp_path / "one", suite=SUITE)
    result = one.finish(num_seeds=1, concurrent=1)[-1]
    assert result["num_trials"] == result["num_run"] == 2 * (7 + 1) == len(one.table())
    two = Runner(checkpoint_dir, digits, tmp_path / "two", suite=SUITE)
    process = two.start(num_seeds=1, concurrent=2)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{") and json.loads(line).get("done", 0) >= 5 and "entry" in line:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(1)
    two.finish(num_seeds=1, concurrent=2)
    assert two.table() == one.table()
    assert [len(found) for found in asked(one).values()] == [3, 3] and asked(two) == asked(one)

    entries = list(Ledger(str(one.out)).entries())
    search = [e for e in entries if e.kind == "search"]
    assert all(
        e.stopped_at == 0 and set(e.hyperparameters) == {"learning_rate", "num_steps", "drop_rate"} for e in search
    )
    # The searched dropout reaches the network, and the test split opens after the record.
    (final, *_) = (e for e in entries if e.kind == "final")
    assert final.config["model"]["options"]["drop_rate"] == final.hyperparameters["drop_rate"]
    assert all(o.time_s >= read_selection(o.selection_url).time_s for o in openings(str(one.out)))
    assert {o.trial for o in openings(str(one.out))} == {e.digest for e in entries if e.kind == "final"}

    findings = load_findings(str(one.out))
    assert played(findings.folders[0]).num == 6 and played(findings.folders[0]).wrong == ()
    page = Path(write_report(str(one.out), tmp_path / "report", show=False)["html"]).read_text()
    assert "6 decisions on candidates played again from what is written down: all hold." in page
    assert page.count('aria-label="Candidates of a search over learning_rate, num_steps, drop_rate"') == 1
