"""Laws of tracking against a real MLflow server that is killed, hangs, refuses, and loses its answers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.spool import system_metrics
from orchestration.spool.spool import Spool
from orchestration.tracking import heartbeat, mlflow_client
from orchestration.tracking.heartbeat import Sweeper
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.translate import STEP_KEYS
from orchestration.tracking.uploader import Uploader
from tests.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.mlflow_server import MlflowServer, mlflow_server
from tests.pipeline import fake_nvml

SCRIPT, ROOT = Path(__file__).parents[1].joinpath("scripted_run.py"), Path(mlflow_client.__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow") / "mlflow.db") as running:
        yield running


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[FaultProxy]:
    with fault_proxy(server.uri) as running:
        yield running


def trainer(
    out: Path, uri: str, first: int, last: int, *, pause_s: float = 0.0, wait_s: float = 240.0
) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NORMFREE_WAIT_FOR_TRACKER": str(wait_s)}
    environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "3"
    command = [sys.executable, str(SCRIPT), str(out), uri, str(first), str(last), str(pause_s)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def uploaders_of(process: subprocess.Popen[str]) -> list[int]:
    """Living ones: a killed one stays a zombie until its trainer looks."""
    import psutil

    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):
            if "orchestration.tracking.start_uploader" in child.cmdline():
                found.append(child.pid)
    return found


def uploader_of(process: subprocess.Popen[str]) -> int:
    (found,) = uploaders_of(process)
    return found


def wait_for(condition: Any, what: str, within_s: float = 120.0) -> Any:
    until = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.1)
    return found


def acknowledged(out: Path) -> int:
    file = out / "tracking.json"
    return next(iter(json.loads(file.read_text()).values()))["acknowledged"] if file.exists() else 0


def the_run(server: MlflowServer, out: Path) -> Any:
    client = connect(server.uri)
    experiments = heartbeat.all_experiments(client)
    runs = [r for r in client.search_runs(experiments) if r.data.tags.get("run_dir") == str(out)]
    assert len(runs) == 1
    return runs[0]


def steps(server: MlflowServer, run: Any, key: str) -> list[int]:
    """In the order of the server's table: sorted means that they arrived in order."""
    return [m.step for m in connect(server.uri).get_metric_history(run.info.run_id, key)]


def all_points(server: MlflowServer, run: Any) -> dict[str, list[int]]:
    return {key: steps(server, run, key) for key in STEP_KEYS.values()}


def once(last: int) -> dict[str, list[int]]:
    return {key: list(range(1, last + 1)) for key in STEP_KEYS.values()}


@pytest.mark.slow
def test_errors_hangs_resets_and_lost_answers_cost_no_exit_code_and_no_point(
    server: MlflowServer, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.faults += [
        Fault(match="experiments/get-by-name", status=500, times=3),
        Fault(match="runs/create", after_bytes=0),  # the run is made, and we never hear of it
        Fault(match="log-batch", after_bytes=0, times=2),  # taken by the server, and the answer lost
        Fault(match="log-batch", status=500, times=2),
        Fault(match="log-batch", delay_s=5.0),  # we give up before it answers; the points arrive nevertheless
        Fault(match="runs/update", after_bytes=0, reset=False),
    ]
    process = trainer(tmp_path / "run", proxy.url, 0, 200, pause_s=0.02)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert not any(fault.times for fault in proxy.faults)
    run = the_run(server, tmp_path / "run")
    assert all_points(server, run) == once(200) and run.info.status == "FINISHED"


def test_a_server_that_never_answers_costs_the_time_set_for_it_and_an_import_brings_every_point_once(
    server: MlflowServer, proxy: FaultProxy, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    proxy.faults.append(Fault(match=".", delay_s=3600.0, times=1 << 30))
    process = trainer(out, proxy.url, 0, 100, wait_s=3.0)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "waiting for MLflow" in said and "normfree track import" in said and "are not in MLflow" in said
    for _ in range(2):
        command = [sys.executable, "-m", "orchestration.cli", "track", "import", str(out), "--tracking-uri", server.uri]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert all_points(server, the_run(server, out)) == once(100)
    assert done.stdout.startswith("0 records of")
    run = the_run(server, out)
    assert run.info.status == "FINISHED" and run.info.run_name == "nfnet_tiny_glyphs"
    times_ms = [round(1000 * json.loads(line)["time_s"]) for line in (out / "records.jsonl").read_text().splitlines()]
    assert run.info.start_time == min(times_ms)  # of its own time, not of the import
    assert run.info.end_time == max(times_ms)


def test_trainer_and_uploader_are_killed_and_the_run_is_one_with_each_point_once(
    server: MlflowServer, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed = trainer(out, server.uri, 0, 100_000, pause_s=0.02)
    wait_for(lambda: acknowledged(out) > 30, "the first attempt sends")
    os.kill(uploader_of(killed), signal.SIGKILL)
    killed.kill()  # both at once, as when a machine's memory is full
    killed.wait()
    resumed = trainer(out, server.uri, 10, 300, pause_s=0.02)  # from the checkpoint of step 10
    wait_for(lambda: (out / "tracking.lock").exists() and len(uploaders_of(resumed)) == 1, "an uploader")
    os.kill(uploader_of(resumed), signal.SIGKILL)  # this one alone: the trainer starts another
    said, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    run = the_run(server, out)
    assert all_points(server, run) == once(max(300, *steps(server, run, "train/loss")))
    assert run.data.tags["attempt"] == "2" and run.info.status == "FINISHED"


def test_a_killed_trainer_is_told_with_its_cause_by_its_uploader(server: MlflowServer, tmp_path: Path) -> None:
    process = trainer(tmp_path, server.uri, 0, 100_000, pause_s=0.05)
    wait_for(lambda: acknowledged(tmp_path) > 5, "the run is on the server")
    process.kill()
    process.wait()
    run = wait_for(
        lambda: (run := the_run(server, tmp_path)).info.status != "RUNNING" and run, "the death is told", 60.0
    )
    assert run.info.status == "KILLED" and "without a last word" in run.data.tags["status.cause"]
    assert run.data.tags["code.revision"] and run.data.tags["code.dirty"] in ("true", "false")
    assert "mlflow 3" in run.data.tags["environment.libraries"]


class Hands:
    """A watch and a clock that the test sets; the clock of this machine may differ from those of others by `skew_s`."""

    def __init__(self, skew_s: float = 0.0) -> None:
        self.now_s, self.skew_s = 0.0, skew_s

    def sweeper(self) -> Sweeper:
        start = time.time()
        return Sweeper(watch=lambda: self.now_s, clock=lambda: start + self.now_s + self.skew_s)


@pytest.mark.parametrize("skew_s", [-600.0, 0.0, 600.0])
def test_a_silent_run_is_failed_within_two_minutes_and_a_living_one_never_whatever_the_clocks_say(
    server: MlflowServer, skew_s: float
) -> None:
    client = connect(server.uri)
    experiment = client.create_experiment(f"silence {skew_s}")
    start = round(time.time())
    tags = {heartbeat.BEAT_TAG: str(start)}
    dead, alive = (client.create_run(experiment, tags=tags).info.run_id for _ in range(2))
    other = client.create_run(experiment).info.run_id  # somebody else's, without signs
    hands = Hands(skew_s)
    sweeper, marked_s = hands.sweeper(), []
    while hands.now_s < 200:
        if hands.now_s % heartbeat.BEAT_EVERY_S == 0:
            client.set_tag(alive, heartbeat.BEAT_TAG, str(start + int(hands.now_s)))
        for run_id, cause in sweeper.look(client, [experiment]):
            assert run_id == dead and cause.startswith("no heartbeat since 20")
            marked_s.append(hands.now_s)
        hands.now_s += heartbeat.LOOK_EVERY_S / 2
    (only,) = marked_s
    assert only <= 110
    status = {run_id: client.get_run(run_id).info.status for run_id in (dead, alive, other)}
    assert status == {dead: "FAILED", alive: "RUNNING", other: "RUNNING"}
    heartbeat.beat(client, dead, revive=True)  # it was only cut off
    assert client.get_run(dead).info.status == "RUNNING" and "status.cause" not in client.get_run(dead).data.tags


def test_an_uploader_ends_the_silent_runs_beside_its_own(server: MlflowServer, tmp_path: Path) -> None:
    client = connect(server.uri)
    experiment = client.create_experiment("siblings")
    dead = client.create_run(experiment, tags={heartbeat.BEAT_TAG: str(round(time.time()) - 300)}).info.run_id
    Spool(tmp_path / "records.jsonl").close()
    work = Uploader(tmp_path, server.uri, experiment="siblings", watch_pid=os.getpid(), poll_s=0.02)
    hands = Hands()
    work._sweeper, work._next_look = hands.sweeper(), 0.0
    work._load()
    work._backlog.poll()
    work._work(False)
    assert client.get_run(dead).info.status == "RUNNING"  # a first look decides nothing
    hands.now_s, work._next_look = heartbeat.SECOND_LOOK_S, 0.0
    work._work(False)
    assert client.get_run(dead).info.status == "FAILED"
    assert client.get_run(work.run_id or "").info.status == "RUNNING"


def test_nodes_are_shown_with_our_devices_only_and_their_samples_arrive_once(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvml.install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    for node in ("node-a", "node-b"):
        for _ in range(2):  # a second start on the same node counts on
            life = subprocess.Popen(["sleep", "0.5"])
            system_metrics.follow(tmp_path, node, life.pid, every_s=0.1)
            life.wait()
    Spool(tmp_path / "records.jsonl").close()
    for _ in range(2):
        work = Uploader(tmp_path, server.uri, experiment="nodes", run_name="r", poll_s=0.02)
        assert work.run() == 0
    run = connect(server.uri).get_run(work.run_id or "")
    metrics = {name.partition("/")[2] for name in run.data.metrics}
    for node in ("node-a", "node-b"):
        num = len((tmp_path / f"system-{node}.jsonl").read_text().splitlines())
        assert num > 2 and steps(server, run, f"system/{node}/cpu_percent") == list(range(1, num + 1))
        assert {f"{node}/gpu0_utilisation_percent", f"{node}/memory_percent", f"{node}/disk_free_gib"} <= metrics
        assert f"{node}/gpu0_power_w" not in metrics and not any("gpu1" in name for name in metrics)


def test_lineage_is_walked_from_a_checkpoint_to_its_run_and_to_the_data(server: MlflowServer, tmp_path: Path) -> None:
    from pipeline.records import Saved

    with Spool(tmp_path / "records.jsonl") as spool:
        for number, digest in enumerate(("aa" * 32, "bb" * 32)):
            spool.append(Saved(step=number, url=f"s3://b/{number}", digest=digest, size_bytes=1, seconds_s=1.0))
    assert Uploader(tmp_path, server.uri, experiment="lineage", run_name="r", poll_s=0.02).run() == 0
    client = connect(server.uri)
    found = client.search_runs(heartbeat.all_experiments(client), "tags.`checkpoint.digests` LIKE '%aaaaaaaaaaaaaaaa%'")
    assert [run.info.run_name for run in found] == ["r"]
    assert found[0].data.tags["checkpoint.digest"] == "bb" * 32


@pytest.mark.slow
def test_10_000_points_arrive_once_though_trainer_uploader_and_server_are_killed_in_turn(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    with mlflow_server(tmp_path / "mlflow.db") as server, fault_proxy(server.uri) as proxy:
        proxy.faults.append(Fault(match="log-batch", after_bytes=0, times=3))
        process = trainer(out, proxy.url, 0, 100_000, pause_s=0.03)
        wait_for(lambda: acknowledged(out) > 100, "the first attempt sends")
        server.kill()
        time.sleep(2.0)
        server.start()
        proxy.faults.append(Fault(match="log-batch", status=500, times=5))
        sent = acknowledged(out)
        wait_for(lambda: acknowledged(out) > sent + 100, "the server is used again")
        os.kill(uploader_of(process), signal.SIGKILL)
        wait_for(lambda: len(uploaders_of(process)) == 1, "another uploader")
        sent = acknowledged(out)
        wait_for(lambda: acknowledged(out) > sent, "the second uploader sends")
        process.kill()  # the trainer alone: its uploader tells its death
        process.wait()
        wait_for(lambda: the_run(server, out).info.status == "KILLED", "the death is told")
        done = steps(server, the_run(server, out), "train/loss")[-1]
        last = max(700, done + 100)  # 17 points a step
        proxy.faults.append(Fault(match="log-batch", after_bytes=0, times=3))
        said, _ = trainer(out, proxy.url, done - 50, last, pause_s=0.01).communicate(timeout=600)
        run = the_run(server, out)
        found = all_points(server, run)
        assert found == once(last), said
        assert sum(map(len, found.values())) >= 10_000 and run.info.status == "FINISHED"
