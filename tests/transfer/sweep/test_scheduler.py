"""The order of a sweep, played through without a scheduler: what is queued, released, stopped, failed and started again."""

import dataclasses
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.augment.augment_config import AugmentConfig
from transfer.protocol.method_settings import FinetuneSettings, RidgeSettings
from transfer.protocol.methods import Method
from transfer.protocol.tasks import Suite, TaskEntry
from transfer.search.grids import brackets
from transfer.search.successive_halving import Rung, read_decision, replay, write_rung
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.entry import Trial, entry
from transfer.sweep.failures import MAX_TRIES, Cause, TrialFailed, cause_of
from transfer.sweep.ledger import Ledger
from transfer.sweep.probe_job import probe_trials
from transfer.sweep.scheduler import Budget, Conductor, Job
from transfer.sweep.sources import Backbone

SOURCE = Backbone(checkpoint_url="nowhere", digest="c" * 64, model="nfnet_tiny", options={}, augment=AugmentConfig())
TUNE = FinetuneSettings(shots=(5,), learning_rates=(0.1, 0.4), num_steps=(20, 40))
SUITE = Suite(
    name="s",
    title="s",
    tasks=(TaskEntry(card="digits", holdout_per_class=10),),
    methods=(
        Method(name="ridge", kind="ridge", settings=RidgeSettings(shots=(1, 5))),
        Method(name="finetune", kind="finetune", settings=TUNE),
    ),
    num_seeds=2,
)
NUM_TRIALS = 2 * 2 * 2 + 2 * (4 + 2)
Player = Callable[[Conductor, str, Job], None]


@pytest.fixture()
def sweep(digits: str, tmp_path: Path) -> Sweep:
    return Sweep(
        out=str(tmp_path), data_root=str(Path(digits).parent), sources=(SOURCE,), suite=SUITE, scheduler="none"
    )


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


def stand(conductor: Conductor, trial: Trial, step: int) -> None:
    """At a rung: the better rate is the larger one, as yet."""
    value = trial.hyperparameters["learning_rate"] / 100
    row = {"step": step, "time_s": 1.0, "loss": 1.0, "accuracy": value}
    write_rung(
        conductor.sweep.out, Rung(digest=trial.digest, step=step, score=value, loss=1.0, rows=[row], seconds_s=1.0)
    )


def well(conductor: Conductor, job_id: str, job: Job) -> None:
    """A worker that succeeds."""
    if job["cell"] >= 0 and job["until"]:
        stand(conductor, Trial(**job["trial"]), job["until"])
    elif job["cell"] >= 0:
        finish(conductor, Trial(**job["trial"]))
    else:
        for index in job["probes"]:
            for trial in probe_trials(conductor.sweep, conductor.cells[index]):
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
    (place,) = (tmp_path / "selection").glob("digits-finetune-scratch-5-*.json")
    record = json.loads(place.read_text())
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


def test_a_process_that_died_is_no_result_and_its_candidate_runs_again(sweep: Sweep) -> None:
    """The best candidate is lost: the table is that of an undisturbed sweep, once it has run."""
    play(start(replace(sweep, out=f"{sweep.out}/undisturbed"))[0])
    expected = table(replace(sweep, out=f"{sweep.out}/undisturbed"))
    deaths: list[str] = []

    def dies(times: int) -> Player:
        def player(conductor: Conductor, job_id: str, job: Job) -> None:
            is_best = job["cell"] >= 0 and job["trial"]["hyperparameters"] == {"learning_rate": 0.1, "num_steps": 40}
            if is_best and job["trial"]["kind"] == "search" and len(deaths) < times:
                deaths.append(job_id)
                conductor.ended(job_id, job, crashed=True)
            else:
                well(conductor, job_id, job)

        return player

    conductor, events = start(sweep)
    play(conductor, dies(2))
    assert conductor.num_failed == 0 and conductor.num_died == 2 and len(deaths) == 2
    assert [e["tries"] for e in events if e["event"] == "again"] == [1, 1]
    tries = [e.num_tries for e in Ledger(sweep.out).entries()]
    assert sorted(tries)[-3:] == [1, 2, 2] and table(sweep) == expected


def test_a_search_that_lacks_a_result_selects_nothing_until_a_later_start_has_it(sweep: Sweep, tmp_path: Path) -> None:
    play(start(replace(sweep, out=f"{sweep.out}/undisturbed"))[0])

    def dies(conductor: Conductor, job_id: str, job: Job) -> None:
        if (
            job["cell"] >= 0
            and job["trial"]["init"] == "scratch"
            and job["trial"]["hyperparameters"]["num_steps"] == 40
        ):
            conductor.ended(job_id, job, crashed=True)
        else:
            well(conductor, job_id, job)

    conductor, _ = start(sweep)
    play(conductor, dies)
    assert conductor.num_died == 2 * MAX_TRIES and conductor.num_failed == 2 + 2
    assert not list((tmp_path / "selection").glob("digits-finetune-scratch-*"))
    failed = [e for e in Ledger(sweep.out).entries() if e.kind == "final" and not e.is_ok]
    assert len(failed) == 2 and all(e.cause == "search" and "learning_rate" in str(e.error) for e in failed)
    play(start(sweep)[0])
    assert table(sweep) == table(replace(sweep, out=f"{sweep.out}/undisturbed"))


@pytest.mark.parametrize("how", ["time limit", "gone", "stopped", "memory"])
def test_no_other_loss_of_a_candidate_changes_what_is_selected(sweep: Sweep, tmp_path: Path, how: str) -> None:
    def loses(conductor: Conductor, job_id: str, job: Job) -> None:
        if job["cell"] < 0 or job["trial"]["kind"] == "final" or job["trial"]["hyperparameters"]["num_steps"] != 40:
            return well(conductor, job_id, job)
        trial = Trial(**job["trial"])
        if how == "gone":
            conductor.settled.add(trial.digest)
        elif how == "time limit":
            conductor.limit_s = 1e-9
        else:
            error = MemoryError("x") if how == "memory" else TrialFailed("SIGTERM", "lost")
            conductor.ledger.write(conductor.sweep.failed(trial, str(error), cause_of(error)))
        return conductor.ended(job_id, job, crashed=how == "time limit")

    conductor, _ = start(sweep)
    play(conductor, loses)
    assert not list((tmp_path / "selection").glob("digits-finetune-*"))
    assert all(not e.is_ok for e in conductor.ledger.entries() if e.kind == "final" and e.method == "finetune")


@pytest.mark.parametrize("cause", ["error", "diverged"])
def test_a_search_without_a_survivor_ends_its_cell_and_is_tried_again_unless_it_diverged(
    sweep: Sweep, cause: Cause
) -> None:
    def fails(conductor: Conductor, job_id: str, job: Job) -> None:
        if job["cell"] >= 0:
            conductor.ledger.write(conductor.sweep.failed(Trial(**job["trial"]), "it ended early", cause))
            conductor.ended(job_id, job, crashed=False)
        else:
            well(conductor, job_id, job)

    conductor, _ = start(sweep)
    play(conductor, fails)
    assert conductor.num_failed == 2 * (4 + 2) and conductor.done == conductor.total
    conductor, _ = start(sweep)
    jobs = play(conductor)
    if cause == "diverged":  # a result: of finals too, which no rate is left for
        assert not jobs and conductor.num_run == 0 and conductor.done == conductor.total
        assert not any(e.lacks_result for e in Ledger(sweep.out).entries())
    else:
        assert conductor.num_failed == 0 and all(e.status == "ok" for e in Ledger(sweep.out).entries())


MANY = FinetuneSettings(shots=(5,), learning_rates=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), num_steps=(18, 90))


def halving(sweep: Sweep, out: Path, scheduler: Any = "halving") -> Sweep:
    methods = (Method(name="finetune", kind="finetune", settings=MANY),)
    return replace(sweep, out=str(out), suite=replace(SUITE, methods=methods), scheduler=scheduler)


def table(sweep: Sweep) -> dict[str, Any]:
    return {e.digest: (e.value, e.stopped_at, e.status, e.hyperparameters) for e in Ledger(sweep.out).entries()}


def shuffled(sweep: Sweep, seed: int, limit: int = 1000) -> int:
    """Any job that is ready next, in any order, several at a time."""
    conductor, _ = start(sweep)
    draw, running, number = random.Random(seed), [], 0
    while number < limit:
        while len(running) < 4 and (job := conductor.next_job(str(number))) is not None:
            running.append((str(number), json.loads(json.dumps(job))))
            number += 1
        if not running:
            break
        well(conductor, *running.pop(draw.randrange(len(running))))
    return number


@pytest.mark.parametrize("scheduler", ["halving", "hyperband"])
def test_who_goes_on_depends_on_no_order_and_on_no_kill(scheduler: str, sweep: Sweep, tmp_path: Path) -> None:
    one = halving(sweep, tmp_path / "one", scheduler)
    num_jobs = shuffled(one, seed=0)
    expected = table(one)
    finals = [e for e in Ledger(one.out).entries() if e.kind == "final"]
    assert len(finals) == 2 * 2 and len(expected) == 2 * 18 + 2 * 2
    two = halving(sweep, tmp_path / "two", scheduler)
    shuffled(two, seed=1)
    assert table(two) == expected
    three = halving(sweep, tmp_path / "three", scheduler)
    jobs = [shuffled(three, seed=s, limit=5) for s in range(40)]
    assert table(three) == expected
    # Four are lost a kill at most, and run again; nothing else is.
    assert sum(jobs) <= num_jobs + 4 * sum(1 for n in jobs if n)


def test_halving_lets_a_third_go_on_and_the_decision_can_be_played_again(sweep: Sweep, tmp_path: Path) -> None:
    one = halving(sweep, tmp_path / "one")
    shuffled(one, seed=0)
    cell = plan(one)[0][0]
    (long, short) = brackets(cell.points, "halving")
    assert (long.rungs, short.rungs) == ((10, 30), (2, 6)) and len(long.members) == 9
    for number, bracket in enumerate((long, short)):
        for step, kept in zip(bracket.rungs, (3, 1), strict=True):
            decision = read_decision(f"{one.out}/decisions/{cell.name}-{number}-{step}.json")
            assert decision is not None and len(decision.kept) == kept
            assert replay(decision) == decision.kept
            rates = [cell.points[i]["learning_rate"] for i in decision.kept]
            assert rates == [0.9, 0.8, 0.7][:kept]
            turned = dataclasses.replace(decision, rows=[{**r, "score": -r["score"]} for r in decision.rows])
            assert replay(turned) != decision.kept
    entries = [e for e in Ledger(one.out).entries() if e.kind == "search" and e.init == cell.init]
    assert sorted(e.stopped_at for e in entries) == [0, 0, 2, 2, 2, 2, 2, 2, 6, 6, *([10] * 6), 30, 30]


def test_hyperband_begins_to_decide_later_and_later() -> None:
    points: list[dict[str, float | int]] = [{"learning_rate": float(i), "num_steps": 90} for i in range(9)]
    found = brackets(points, "hyperband")
    assert [b.rungs for b in found] == [(10, 30), (30,), ()]
    assert sorted(i for b in found for i in b.members) == list(range(9))


def test_a_budget_leaves_the_rest_to_the_next_call(sweep: Sweep) -> None:
    events: list[dict[str, Any]] = []
    cells = plan(sweep)[0]
    conductor = Conductor(sweep, cells, events.append, budget=Budget(trials=3))
    play(conductor)
    assert conductor.spent == "3 trials" and conductor.has_work and [e["event"] for e in events][-1] == "budget"
    done = conductor.done
    conductor = Conductor(sweep, cells, events.append)
    assert conductor.done == done
    play(conductor)
    assert not conductor.spent and conductor.done == conductor.total == NUM_TRIALS


def test_a_trial_that_was_ended_at_its_limit_says_so(sweep: Sweep) -> None:
    conductor = Conductor(sweep, plan(sweep)[0], lambda event: None, limit_s=0.001)
    jobs = [conductor.next_job(str(i)) for i in range(3)]
    time.sleep(0.01)
    job = jobs[2]
    assert job is not None and job["cell"] >= 0
    conductor.ended("2", job, crashed=True)
    found = Ledger(sweep.out).find(Trial(**job["trial"]).digest)
    assert found is not None and found.status == "failed" and "--trial-limit" in str(found.error)


def test_backbones_of_one_architecture_share_their_from_scratch_twin(sweep: Sweep) -> None:
    other = replace(SOURCE, digest="d" * 64, name="b", checkpoint_url="elsewhere")
    third = replace(SOURCE, digest="e" * 64, name="c", model="nfnet_f0")
    cells = plan(replace(sweep, sources=(replace(SOURCE, name="a"), other, third)))[0]
    ridge = [c for c in cells if c.method == "ridge" and c.shots == 1]
    assert [c.init for c in ridge].count("pretrained") == 3 and [c.init for c in ridge].count("scratch") == 2
    assert len({c.any_trial.protocol_digest for c in ridge}) == 1  # so they stand in one table
    assert len({c.name for c in cells}) == len(cells)
