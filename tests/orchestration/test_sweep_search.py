"""A search by a model with real trials under Ray Tune: equal for any number at a time and after a kill, and its page."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.orchestration.test_sweep import Runner, checkpoint_dir  # noqa: F401
from transfer.findings import load_findings, played
from transfer.ledger import Ledger
from transfer.report import write_report
from transfer.search import written
from transfer.splits import openings, read_selection

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
