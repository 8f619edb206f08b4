"""The order of a sweep, played through without a scheduler: what is queued, released, stopped, failed and started again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.augment import AugmentConfig
from transfer.cells import Sweep, plan
from transfer.conductor import Conductor, Job
from transfer.finetune import Source
from transfer.ledger import Ledger, Trial, entry
from transfer.tasks import FinetuneSettings, RidgeSettings, Suite, TaskEntry
from transfer.trials import ridge_finals

SOURCE = Source(checkpoint_url="nowhere", digest="c" * 64, model="nfnet_tiny", options={}, augment=AugmentConfig())
SUITE = Suite(
    name="s",
    title="s",
    tasks=(TaskEntry(card="digits", holdout_per_class=10),),
    ridge=RidgeSettings(shots=(1, 5)),
    finetune=FinetuneSettings(shots=(5,), learning_rates=(0.1, 0.4), num_steps=(20, 40)),
    num_seeds=2,
)
NUM_TRIALS = 2 * 2 * 2 + 2 * (4 + 2)
Player = Callable[[Conductor, str, Job], None]


@pytest.fixture()
def sweep(digits: str, tmp_path: Path) -> Sweep:
    return Sweep(out=str(tmp_path), data_root=str(Path(digits).parent), source=SOURCE, suite=SUITE)


def start(sweep: Sweep) -> tuple[Conductor, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return Conductor(sweep, plan(sweep)[0], events.append), events


def score(trial: Trial) -> float:
    """0.1 is the better rate, and the longer schedule."""
    return 0.5 + (trial.hyperparameters.get("learning_rate") == 0.1) * 0.2 + trial.hyperparameters["num_steps"] / 400


def finish(conductor: Conductor, trial: Trial, value: float | None = None, error: str | None = None) -> None:
    row = {"step": trial.hyperparameters.get("num_steps", 0), "time_s": 1.0, "loss": 1.0, "accuracy": 0.5}
    value = value if value is not None or error else score(trial) if trial.method == "finetune" else 0.3
    found = entry(trial, task_title="d", checkpoint_url="u", value=value, history=[row], error=error)
    Ledger(conductor.sweep.out).write(found)


def well(conductor: Conductor, job_id: str, job: Job) -> None:
    """A worker that succeeds."""
    if job["cell"] >= 0:
        finish(conductor, Trial(**job["trial"]))
    else:
        for index in job["ridge"]:
            for trial in ridge_finals(conductor.sweep, conductor.cells[index]):
                finish(conductor, trial)
                conductor.reported(job_id, job, {"digest": trial.digest})
    conductor.ended(job_id, job, crashed=False)


def play(conductor: Conductor, player: Player = well, limit: int = 1000) -> list[Job]:
    jobs = []
    for number in range(limit):
        job = conductor.next_job(str(number))
        if job is None:
            break
        jobs.append(json.loads(json.dumps(job)))  # jobs travel
        player(conductor, str(number), jobs[-1])
    return jobs


def test_each_cell_is_searched_then_selected_then_finished(sweep: Sweep, tmp_path: Path) -> None:
    conductor, events = start(sweep)
    assert conductor.total == NUM_TRIALS
    jobs = play(conductor)
    assert len(jobs) == 2 + 2 * (4 + 2) and not conductor.has_work
    assert (conductor.done, conductor.num_run, conductor.num_failed) == (NUM_TRIALS, NUM_TRIALS, 0)
    selected = set()
    for event in events:
        if event["event"] == "selected":
            selected.add(event["init"])
        elif event["entry"]["kind"] == "final" and event["entry"]["method"] == "finetune":
            assert event["entry"]["init"] in selected
            assert event["entry"]["hyperparameters"] == {"learning_rate": 0.1, "num_steps": 40}
    assert [e["done"] for e in events if e["event"] == "trial"] == list(range(1, NUM_TRIALS + 1))
    record = json.loads((tmp_path / "selection" / "digits-finetune-scratch-5.json").read_text())
    assert [c["status"] for c in record["candidates"]] == ["ok"] * 4 and record["time_s"] > 0


def test_nothing_that_is_done_runs_again_wherever_it_was_killed(sweep: Sweep) -> None:
    seen: list[str] = []
    for _ in range(40):  # each start gets one job further
        conductor, _ = start(sweep)
        jobs = play(conductor, limit=1)
        if not jobs:
            break
        seen += [json.dumps(job, sort_keys=True) for job in jobs]
    assert len(seen) == len(set(seen)) == 2 + 2 * (4 + 2)
    assert conductor.done == conductor.total and not conductor.has_work


def test_a_sweep_grows_by_seeds_without_a_new_search(sweep: Sweep) -> None:
    play(start(sweep)[0])
    conductor, _ = start(replace(sweep, suite=replace(SUITE, num_seeds=3)))
    jobs = play(conductor)
    assert sorted(job["trial"]["seed"] for job in jobs if job["cell"] >= 0) == [2, 2]
    assert conductor.num_run == 4 + 2 and conductor.done == conductor.total == NUM_TRIALS + 4 + 2


def test_a_candidate_stopped_at_a_rung_is_recorded_and_not_chosen(sweep: Sweep) -> None:
    def stops(conductor: Conductor, job_id: str, job: Job) -> None:
        if job["cell"] >= 0 and job["trial"]["kind"] == "search" and job["trial"]["hyperparameters"]["num_steps"] == 40:
            row = {"step": 10, "time_s": 1.0, "loss": 0.1, "accuracy": 0.99, "trial_id": "x"}
            conductor.reported(job_id, job, row)
            conductor.reported(job_id, job, row)  # as Tune does at a trial's end
            conductor.ended(job_id, job, crashed=False)
        else:
            well(conductor, job_id, job)

    conductor, events = start(sweep)
    play(conductor, stops)
    assert conductor.num_failed == 0
    stopped = [e["entry"] for e in events if e["event"] == "trial" and e["entry"]["value"] == 0.99]
    assert len(stopped) == 4 and all(len(e["history"]) == 1 and e["num_test"] == 100 for e in stopped)
    finals = [e["entry"] for e in events if e["event"] == "trial" and e["entry"]["kind"] == "final"]
    assert all(e["hyperparameters"]["num_steps"] == 20 for e in finals if e["method"] == "finetune")


def test_a_dead_worker_is_one_failed_trial_and_the_next_start_mends_it(sweep: Sweep) -> None:
    def dies(conductor: Conductor, job_id: str, job: Job) -> None:
        if job["cell"] < 0 or job["trial"]["kind"] == "final":
            conductor.ended(job_id, job, crashed=True)
        else:
            well(conductor, job_id, job)

    conductor, events = start(sweep)
    play(conductor, dies)
    assert conductor.num_failed == 8 + 4 and conductor.done == conductor.total
    failed = [e["entry"] for e in events if e["event"] == "trial" and e["entry"]["status"] == "failed"]
    assert all("died" in e["error"] for e in failed)
    conductor, _ = start(sweep)
    assert conductor.done == 8
    jobs = play(conductor)
    assert len(jobs) == 2 + 4 and conductor.num_failed == 0
    assert all(e.status == "ok" for e in Ledger(sweep.out).entries())


def test_a_search_without_a_survivor_ends_its_cell_and_can_be_tried_again(sweep: Sweep) -> None:
    def diverges(conductor: Conductor, job_id: str, job: Job) -> None:
        if job["cell"] >= 0:
            finish(conductor, Trial(**job["trial"]), error="3 updates in a row were not finite")
            conductor.ended(job_id, job, crashed=False)
        else:
            well(conductor, job_id, job)

    conductor, _ = start(sweep)
    play(conductor, diverges)
    assert conductor.num_failed == 2 * (4 + 2) and conductor.done == conductor.total
    conductor, _ = start(sweep)
    play(conductor)
    assert conductor.num_failed == 0 and all(e.status == "ok" for e in Ledger(sweep.out).entries())
