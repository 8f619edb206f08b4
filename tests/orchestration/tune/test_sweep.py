"""A real sweep under Ray Tune: killed, gone on with, repeated, extended; with trials that fail in the midst of it."""

import dataclasses
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.checkpoint import retention
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.duration import Duration
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig
from pipeline.storage import ownership, process_identity
from pipeline.training.run import Run
from pipeline.training.train import train
from tests.orchestration.sweep_runner import SUITE, Runner
from transfer.protocol.sealed_splits import openings, read_selection
from transfer.sweep.cells import plan, sweep_of
from transfer.sweep.ledger import Ledger

NUM_TRIALS = 2 * 2 + 2 * 2 + 2 * (3 + 2)  # kNN has no more than k = 1 of one image a class, so nothing to search


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has seen three steps of noise in four classes."""
    folder = tmp_path_factory.mktemp("upstream")
    rng = np.random.Generator(np.random.PCG64(0))
    for split in ("train", "val"):
        for name in "abcd":
            (folder / "raw" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "raw" / split / name / f"{i}.png")
    prepare(load_card("images"), str(folder / "data"), source=str(folder / "raw"))
    run = Run(
        name="upstream",
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(url=str(folder / "data")),
        augment=AugmentConfig(image_px=16),
        optim=OptimConfig(learning_rate=0.05),
        global_batch=4,
        duration=Duration(3, "steps"),
    )
    list(train(run, str(folder / "run")))
    return folder / "run"


@pytest.fixture(scope="module")
def runner(checkpoint_dir: Path, digits: str, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(checkpoint_dir, digits, tmp_path_factory.mktemp("sweep"))


def test_a_driver_killed_at_any_time_is_gone_on_with(runner: Runner) -> None:
    process = runner.start()
    assert process.stdout is not None
    done = 0
    for line in process.stdout:
        done = json.loads(line).get("done", 0) if line.startswith("{") else 0
        if done >= 6:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert done >= 6
    time.sleep(1)  # workers notice, and whatever they still finish counts
    ledger = Ledger(str(runner.out))
    before = runner.files()
    good = {n: t for n, t in before.items() if ledger.find(n.removesuffix(".json")).status == "ok"}  # type: ignore[union-attr]

    events = runner.finish()
    result = events[-1]
    assert {n: t for n, t in runner.files().items() if n in good} == good
    assert len(runner.files()) == result["num_trials"] == NUM_TRIALS
    assert result["num_run"] <= NUM_TRIALS - len(good)
    assert [row["shots"] for row in result["not_run"]] == [200] and ledger.info().not_run == result["not_run"]
    # A rate of 1e30 diverges: red rows, and the sweep went on.
    failed = [e for e in ledger.entries() if e.status == "failed"]
    assert {(e.kind, e.hyperparameters["learning_rate"]) for e in failed} <= {("search", 1e30)}
    assert all(re.search("not finite|not a number", str(e.error)) for e in failed)
    finals = [e for e in ledger.entries() if e.kind == "final"]
    assert len(finals) == 2 * (2 + 2 + 2) and all(e.num_test == 697 for e in finals)
    assert {e.metric for e in finals} == {"top1"} and {e.seed for e in finals} == {0, 1}
    assert len(list((runner.out / "selection").iterdir())) == 6
    # Every final has its predictions, and opened the test split after its selection record was written, once a run of it.
    assert {p.stem for p in (runner.out / "predictions").iterdir()} == {e.digest for e in finals}
    found = openings(str(runner.out))
    assert {o.trial for o in found} == {e.digest for e in finals}
    assert all(o.time_s >= read_selection(o.selection_url).time_s for o in found)
    assert len(list((runner.out / "decisions").iterdir())) == 2
    assert not list((runner.out / "work").glob("*/checkpoints/*/commit.json"))


def test_the_checkpoint_is_kept_from_its_runs_retention(runner: Runner, checkpoint_dir: Path) -> None:
    (kept,) = (checkpoint_dir / "checkpoints").glob("*/KEEP")
    assert str(runner.out) in kept.read_text()
    assert retention.retain(str(checkpoint_dir), retention.Policy(last=1)) == []


def test_a_sweep_knows_what_it_takes_to_run_its_trials_again(runner: Runner) -> None:
    sweep = sweep_of(str(runner.out))
    assert {t.digest for c in plan(sweep)[0] for t in c.search} <= set(runner.table())


def test_worker_processes_are_used_again_and_leave_nothing_behind(runner: Runner) -> None:
    left = sorted(p.name.rsplit("-", 1)[0] for p in (runner.folder / "tmp").iterdir())
    # A process makes one group, whatever the number of its trials: two workers in each of at most two starts.
    assert left.count("normfree-group") <= 4
    # The killed driver could not clean up; the one that ended did.
    assert left.count("normfree-tune") <= 1 and left.count("normfree-trial") <= 2


def test_the_same_command_again_runs_nothing_and_starts_no_ray(runner: Runner) -> None:
    before = runner.files()
    events = runner.finish()
    assert events[-1]["num_run"] == 0 and "running trials" not in [e.get("name") for e in events]
    assert runner.files() == before and events[-1]["num_failed"] == 0


def test_mistakes_are_named_before_anything_starts(runner: Runner, checkpoint_dir: Path, digits: str) -> None:
    from orchestration.tune.ray_tune import transfer

    root, suite, out = str(Path(digits).parent), str(runner.folder / "suite.yaml"), str(runner.out)
    with pytest.raises(UserError, match="no checkpoint"):
        transfer(str(runner.folder), suite, out, data_root=root)
    with pytest.raises(UserError, match="did you mean 'demo'"):
        transfer(str(checkpoint_dir), "dmo", out, data_root=root)
    with pytest.raises(UserError, match="normfree data prepare"):
        transfer(str(checkpoint_dir), suite, out, data_root=str(runner.folder))
    with pytest.raises(UserError, match="--seeds is 0"):
        transfer(str(checkpoint_dir), suite, out, data_root=root, num_seeds=0)
    other = runner.folder / "other.yaml"
    other.write_text(SUITE.replace("[6]", "[7]"))
    with pytest.raises(UserError, match="another suite"):
        transfer(str(checkpoint_dir), str(other), out, data_root=root)
    driver = dataclasses.replace(
        process_identity.this_process(), pid=os.getppid(), started=process_identity.started_at(os.getppid())
    )
    now_s = time.time()
    record = ownership.Record(what="sweep", token="ab" * 16, since_s=now_s, beat_s=now_s, processes=(driver,))
    (runner.out / ownership.NAME).write_bytes(record.to_json())
    with pytest.raises(UserError, match=f"in use: a sweep of process {os.getppid()} on "):
        transfer(str(checkpoint_dir), suite, out, data_root=root)
    (runner.out / ownership.NAME).unlink()


@pytest.mark.slow
def test_one_trial_at_a_time_and_two_give_equal_numbers_and_so_do_ten_kills(
    runner: Runner, checkpoint_dir: Path, digits: str, tmp_path: Path
) -> None:
    runner.finish()
    expected = runner.table()
    one = Runner(checkpoint_dir, digits, tmp_path / "one")
    one.finish(concurrent=1)
    assert one.table() == expected
    killed = Runner(checkpoint_dir, digits, tmp_path / "killed")
    draw = random.Random(0)
    written: dict[str, int] = {}
    for _ in range(10):
        process = killed.start()
        time.sleep(draw.uniform(5, 60))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(1)
        good = {d for d, row in killed.table().items() if row[4] == "ok"}
        times = {n.removesuffix(".json"): t for n, t in killed.files().items()}
        assert all(times[d] == t for d, t in written.items())  # no finished trial ran again
        written |= {d: times[d] for d in good}
    killed.finish()
    assert killed.table() == expected


FAULTS = """
import ctypes, json, os, signal, sys
import orchestration.tune.ray_tune as sweep
original = sweep._trainable

def faulty(config, sweep, **rest):
    import transfer.sweep.trials as trials
    real = trials.run_finetune
    def run(sweep, trial, report, **rest):
        rate = trial.hyperparameters["learning_rate"]
        if rate == 0.7:
            ctypes.PyDLL(None).sleep(100000)  # hangs where no Python thread can run
        if rate == 0.8:
            os.kill(os.getpid(), signal.SIGKILL)
        if rate == 0.9:
            bytearray(1 << 62)
        return real(sweep, trial, report, **rest)
    trials.run_finetune = run
    try:
        original(config, sweep=sweep, **rest)
    finally:
        trials.run_finetune = real

if __name__ == "__main__":
    checkpoint, suite, out, root, seeds, concurrent = sys.argv[1:]
    sweep._trainable = faulty
    result = sweep.transfer(checkpoint, suite, out, data_root=root, num_seeds=1, scheduler="none",
                            resources=sweep.Resources(max_concurrent=2, trial_limit_s=60.0))
    print(json.dumps({"num_failed": result.num_failed, "num_run": result.num_run}))
"""


@pytest.mark.slow
def test_a_search_with_a_trial_that_hangs_dies_or_wants_too_much_memory_selects_nothing(
    checkpoint_dir: Path, digits: str, tmp_path: Path
) -> None:
    suite = (
        SUITE.split("  ridge")[0] + "  finetune: {shots: [1], learning_rates: [0.1, 0.7, 0.8, 0.9], num_steps: [2]}\n"
    )
    faulty = Runner(checkpoint_dir, digits, tmp_path / "faults", suite=suite, program=FAULTS)
    assert faulty.finish()[-1] == {"num_failed": 2 * (3 + 1), "num_run": 2 * (4 + 1)}
    failed = {
        e.hyperparameters["learning_rate"]: e
        for e in Ledger(str(faulty.out)).entries()
        if e.kind == "search" and not e.is_ok
    }
    assert "--trial-limit" in str(failed[0.7].error) and "died" in str(failed[0.8].error)
    assert "MemoryError" in str(failed[0.9].error)
    assert [failed[rate].num_tries for rate in (0.7, 0.8, 0.9)] == [1, 3, 3]
    finals = [e for e in Ledger(str(faulty.out)).entries() if e.kind == "final"]
    assert len(finals) == 2 and all(e.cause == "search" for e in finals) and not (faulty.out / "selection").exists()


DIES_ONCE = """
import json, os, signal, sys
from pathlib import Path
import orchestration.tune.ray_tune as sweep
original = sweep._trainable

def dying(config, sweep, **rest):
    import transfer.sweep.trials as trials
    real = trials.run_finetune
    def run(sweep, trial, report, **rest):
        mark = Path(sweep.out).with_name(f"died-{trial.init}")
        if trial.kind == "search" and trial.hyperparameters["learning_rate"] == 0.1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(sweep, trial, report, **rest)
    trials.run_finetune = run
    try:
        original(config, sweep=sweep, **rest)
    finally:
        trials.run_finetune = real

if __name__ == "__main__":
    checkpoint, suite, out, root, seeds, concurrent = sys.argv[1:]
    if Path(out).with_name("disturbed").exists():
        sweep._trainable = dying
    result = sweep.transfer(checkpoint, suite, out, data_root=root, num_seeds=1,
                            resources=sweep.Resources(max_concurrent=2))
    print(json.dumps({"num_failed": result.num_failed, "num_run": result.num_run}))
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_once_changes_no_number(checkpoint_dir: Path, digits: str, tmp_path: Path) -> None:
    suite = SUITE.split("  ridge")[0] + "  finetune: {shots: [1], learning_rates: [0.1, 0.3], num_steps: [20]}\n"
    runs = [Runner(checkpoint_dir, digits, tmp_path / name, suite=suite, program=DIES_ONCE) for name in ("ref", "kill")]
    (runs[1].folder / "disturbed").touch()
    secret = {"AWS_SECRET_ACCESS_KEY": "plantedMARK", "MLFLOW_TRACKING_PASSWORD": "plantedMARK"}
    runs[1]._variables = secret
    assert [run.finish()[-1] for run in runs] == [{"num_failed": 0, "num_run": 6}] * 2
    assert len(list(runs[1].folder.glob("died-*"))) == 2 and runs[0].table() == runs[1].table()
    assert sorted(e.num_tries for e in Ledger(str(runs[1].out)).entries()) == [1, 1, 1, 1, 2, 2]
    assert not [p for p in runs[1].folder.rglob("*") if p.is_file() and b"plantedMARK" in p.read_bytes()]


FREEZES = """
import json, os, signal, sys
import orchestration.tune.ray_tune as sweep
original = sweep._trainable

def freezing(config, sweep, **rest):
    if config["trial"]["hyperparameters"]["learning_rate"] == 0.7:
        os.kill(os.getpid(), signal.SIGSTOP)  # its own clock stands still too
    original(config, sweep=sweep, **rest)

if __name__ == "__main__":
    checkpoint, suite, out, root, seeds, concurrent = sys.argv[1:]
    sweep._trainable = freezing
    result = sweep.transfer(checkpoint, suite, out, data_root=root, num_seeds=1, scheduler="none",
                            resources=sweep.Resources(max_concurrent=2, trial_limit_s=60.0))
    print(json.dumps({"num_failed": result.num_failed, "num_run": result.num_run}))
"""


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_ended_by_the_driver_and_the_sweep_goes_on(
    checkpoint_dir: Path, digits: str, tmp_path: Path
) -> None:
    suite = SUITE.split("  ridge")[0] + "  finetune: {shots: [1], learning_rates: [0.1, 0.7], num_steps: [2]}\n"
    frozen = Runner(checkpoint_dir, digits, tmp_path / "frozen", suite=suite, program=FREEZES)
    events = frozen.finish()
    failed = [e for e in Ledger(str(frozen.out)).entries() if e.kind == "search" and e.status == "failed"]
    assert [e.hyperparameters.get("learning_rate") for e in failed] == [0.7, 0.7], [e.error for e in failed]
    assert all("not done after 60 s (--trial-limit)" in str(e.error) for e in failed)
    assert events[-1] == {"num_failed": 2 * 2, "num_run": 2 * (2 + 1)}


STEPS = """
import os, sys
import orchestration.tune.ray_tune as sweep
original = sweep._trainable

def counted(config, sweep, **rest):
    import time
    from pipeline.training.sample_account import Account
    from transfer.sweep import trial_ranks
    trial_ranks.SAVE_SHARE = 100.0  # on a loaded machine too, an epoch is worth its save
    real = Account.enter
    folder = os.path.dirname(sweep.out)
    def enter(self, step, *args, **kwargs):
        with open(f"{folder}/steps", "a") as file:
            file.write(f"{step + 1}\\n")
        time.sleep(0.1)
        return real(self, step, *args, **kwargs)
    Account.enter = enter
    try:
        original(config, sweep=sweep, **rest)
    finally:
        Account.enter = real

if __name__ == "__main__":
    checkpoint, suite, out, root, seeds, concurrent = sys.argv[1:]
    sweep._trainable = counted
    sweep.transfer(checkpoint, suite, out, data_root=root, num_seeds=1,
                   resources=sweep.Resources(max_concurrent=1))
"""


@pytest.mark.slow
def test_a_kill_of_the_driver_loses_at_most_one_epoch(checkpoint_dir: Path, digits: str, tmp_path: Path) -> None:
    """Of one trial at a time; its steps are counted as they are made."""
    epoch = 5  # 20 images, 4 a step
    suite = SUITE.split("  ridge")[0]
    suite += "  finetune: {shots: [2], learning_rates: [0.1], num_steps: [400], batch: 4}\n"
    killed = Runner(checkpoint_dir, digits, tmp_path / "killed", suite=suite, program=STEPS)
    steps = killed.folder / "steps"
    steps.touch()
    saved = 0
    for number in (12, 9, 14):
        before = len(steps.read_text().split())
        process = killed.start(num_seeds=1, concurrent=1)
        deadline = time.monotonic() + 300
        while len(steps.read_text().split()) < before + number:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(5)  # its worker notices, and whatever it still does counts
        made = [int(step) for step in steps.read_text().split()[before:]]
        assert made[0] == saved + 1  # it went on from there
        reached = made[-1]
        commits = list((killed.out / "work").glob("*/checkpoints/*/commit.json"))
        saved = max(int(p.parent.name.removeprefix("step_")) for p in commits)
        assert 0 <= reached - saved <= epoch and saved % epoch == 0
    assert saved >= 20
