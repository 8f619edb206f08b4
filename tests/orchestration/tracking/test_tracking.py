"""Laws of the spool and of the way to MLflow, against a real MLflow on SQLite."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestration.figures.run_figures import Pictures
from orchestration.serve.server import serve
from orchestration.spool.mirror import Mirror, pull
from orchestration.spool.spool import Follower, Spool, read
from orchestration.tracking import mlflow_client, sweep_summary, uploader
from orchestration.tracking import start_uploader as start_uploader_module
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.start_uploader import start_uploader
from orchestration.tracking.sweep_tracking import SweepTracker
from orchestration.tracking.tracking_uri import resolve_uri
from orchestration.tracking.translate import STEP_KEYS, Translator
from orchestration.tracking.uploader import Uploader
from pipeline.errors import UserError
from pipeline.records import Evaluation, Finished, PassedOver, Saved, Skipped, Started, Step, Stopped
from pipeline.secrets import public
from pipeline.storage import objects
from transfer.results.scorecard import Row
from transfer.results.statistics import Estimate

T0_S = 1_700_000_000.0


def step(number: int, loss: float = 2.0, *, time_s: float | None = None) -> Step:
    return Step(
        step=number,
        time_s=T0_S + number if time_s is None else time_s,
        num_updates=1,
        samples=number * 64,
        epoch=number / 10,
        loss=loss,
        accuracy=0.5,
        learning_rate=0.1,
        clipped_share=0.2,
        gradient_norm=1.5,
        images_per_s=100.0,
        flops_share=0.4,
        data_wait_s=0.01,
        step_s=0.64,
        remaining_s=5.0,
    )


def started(number: int = 0, *, total_steps: int = 300, resumed_from: str | None = None) -> Started:
    return Started(
        step=number,
        time_s=T0_S + number,
        run_name="r",
        run_dir="/runs/r",
        total_steps=total_steps,
        total_samples=total_steps * 64,
        samples_per_epoch=640,
        steps_per_epoch=10.0,
        dropped_samples=3,
        global_batch=64,
        micro_batch=32,
        accumulation=1,
        num_ranks=2,
        num_parameters=1_000_000,
        device="cpu",
        zero_stage=1,
        precision="fp32",
        resumed_from=resumed_from,
        config={"model": {"name": "nfnet_tiny"}, "data": {"url": "s3://user:pass@host/data"}, "seed": 3},
        config_digest="c0ffee",
        dataset_digest="da7a",
    )


def finished(number: int) -> Finished:
    return Finished(
        step=number, time_s=T0_S + 400, checkpoint="/runs/r/c", samples=9, seconds_s=4.0, evaluation={"top1": 0.75}
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: making them takes seconds."""
    file = tmp_path_factory.mktemp("mlflow") / "empty.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def run_dir(tmp_path: Path, empty_database: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


def spool_with(run_dir: Path, *records: Any) -> None:
    with Spool(run_dir / "records.jsonl") as spool:
        for record in records:
            spool.append(record)


def upload(run_dir: Path, **options: Any) -> int:
    return Uploader(run_dir, experiment="e", run_name="r", drain_s=5.0, poll_s=0.02, **options).run()


def runs_of(run_dir: Path) -> list[Any]:
    client = connect(resolve_uri(None, run_dir))
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def the_run(run_dir: Path) -> Any:
    (run,) = runs_of(run_dir)
    return run


def history(run_dir: Path, key: str) -> list[tuple[int, float, int]]:
    points = connect(resolve_uri(None, run_dir)).get_metric_history(the_run(run_dir).info.run_id, key)
    return sorted((p.step, p.value, p.timestamp) for p in points)


def test_a_torn_last_line_waits_and_the_next_attempt_does_not_glue_to_it(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with Spool(path) as spool:
        assert spool.attempt == 1
        spool.append(step(1))
    with path.open("a") as file:
        file.write('{"attempt": 1, "kind": "St')
    follower = Follower(path)
    assert [line.value["kind"] for line in follower.poll()] == ["Attempt", "Step"]
    with Spool(path) as spool:
        assert spool.attempt == 2
        spool.append(step(2))
    assert [(line.number, line.value["kind"]) for line in follower.poll()] == [(3, "Attempt"), (4, "Step")]
    assert follower.num_unreadable == 1
    assert [line.number for line in read(path)] == [0, 1, 3, 4]


def test_each_record_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "records.jsonl")
    spool.append(step(1, loss=float("inf")))
    _, line = read(tmp_path / "records.jsonl")
    assert line.value["loss"] == float("inf") and line.value["time_s"] == T0_S + 1  # raw values stay in the spool


@pytest.mark.filterwarnings("ignore")
def test_300_points_arrive_exactly_once_though_the_uploader_is_killed(run_dir: Path) -> None:
    spool = Spool(run_dir / "records.jsonl")
    spool.append(started())
    (run_dir / "run.yaml").write_text("name: r\n")
    first = start_uploader(run_dir, experiment="e", run_name="r")
    state = run_dir / "tracking.json"
    number, acknowledged, deadline = 0, 0, time.monotonic() + 60
    while acknowledged <= 20 and time.monotonic() < deadline:  # the trainer goes on while the uploader works
        if number < 280:
            number += 1
            spool.append(step(number))
        time.sleep(0.02)
        acknowledged = next(iter(json.loads(state.read_text()).values()))["acknowledged"] if state.exists() else 0
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 20 < acknowledged < 302
    for rest in range(number + 1, 301):
        spool.append(step(rest))
    spool.append(finished(300))
    assert start_uploader(run_dir, experiment="e", run_name="r").wait(timeout=60) == 0

    assert history(run_dir, "train/loss") == [(n, 2.0, round((T0_S + n) * 1000)) for n in range(1, 301)]
    run = the_run(run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.params["config_digest"] == "c0ffee" and run.data.params["model.name"] == "nfnet_tiny"
    assert run.data.metrics["final/top1"] == 0.75
    assert (run_dir / "mlflow-artifacts/e" / run.info.run_id / "artifacts/run.yaml").exists()
    assert not (Path.cwd() / "mlruns").exists()


def test_a_batch_that_arrived_but_was_not_acknowledged_is_not_sent_twice(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool_with(run_dir, started(), *(step(n) for n in range(1, 101)), finished(100))
    sent: list[int] = []
    real = mlflow_client.send

    def send_and_die(client: Any, run_id: str, what: Any) -> None:
        real(client, run_id, what)
        sent.append(len(what.points))
        if len(sent) == 2:
            raise KeyboardInterrupt  # as SIGKILL: after the server has it, before tracking.json says so

    monkeypatch.setattr(uploader, "send", send_and_die)
    with pytest.raises(KeyboardInterrupt):
        upload(run_dir, batch_lines=30)
    assert upload(run_dir, batch_lines=30) == 0
    assert sent[:3] == [
        28 * len(STEP_KEYS),
        30 * len(STEP_KEYS),
        0,
    ]  # the third is the second again: nothing of it was missing
    assert [s for s, _, _ in history(run_dir, "train/loss")] == list(range(1, 101))
    assert upload(run_dir) == 0 and len(history(run_dir, "train/loss")) == 100  # imported once more: nothing new


def test_each_part_of_the_network_is_a_metric_in_the_group_of_its_kind(run_dir: Path) -> None:
    numbers = {"clipped_share": 0.5, "gradient_norm": 3.0, "weight_norm": 2.0, "update_ratio": None}
    parts = {"stem": numbers, "stage 2": {**numbers, "update_ratio": 0.25}, "a/b[c]": numbers}
    spool_with(run_dir, replace(step(1), parts=parts))
    upload(run_dir)
    found = {k: v for k, v in the_run(run_dir).data.metrics.items() if not k.startswith(("train/", "speed/"))}
    ours = {k: v for k, v in found.items() if "a_b_c_" not in k}  # a name that MLflow would refuse loses no other point
    assert ours == {
        "agc/clipped_share/stem": 0.5,
        "agc/clipped_share/stage 2": 0.5,
        "gradient_norm/stem": 3.0,
        "gradient_norm/stage 2": 3.0,
        "weight_norm/stem": 2.0,
        "weight_norm/stage 2": 2.0,
        "update_ratio/stage 2": 0.25,
    }
    assert found.keys() - ours == {f"{k}/a_b_c_" for k in ("agc/clipped_share", "gradient_norm", "weight_norm")}


def test_five_attempts_are_one_run_with_monotone_steps(run_dir: Path) -> None:
    for attempt in range(5):
        first = attempt * 10
        # Each one dies 5 steps after its last checkpoint; the next does these again, at another time of day.
        redone = [step(n, time_s=T0_S + 1000 * attempt + n) for n in range(first + 1, first + 16)]
        spool_with(run_dir, started(first, total_steps=100 + attempt), *redone)
        upload(run_dir)
        run = the_run(run_dir)
        assert run.info.status == "KILLED" and "without a last word" in run.data.tags["status.cause"]
    assert [s for s, _, _ in history(run_dir, "train/loss")] == list(range(1, 56))
    assert run.data.tags["attempt"] == "5"
    assert run.data.params["total_steps"] == "100"
    assert run.data.tags["attempt.3.changed"] == "total_steps 100 -> 102; total_samples 6400 -> 6528"
    assert run.data.tags["attempt.5.start"].startswith("step 40 from")


@pytest.mark.parametrize(
    "last, status, cause",
    [
        (finished(3), "FINISHED", "all steps are done"),
        (Stopped(step=3, checkpoint="c", reason="SIGTERM"), "KILLED", "SIGTERM"),
        ("out of memory", "FAILED", "out of memory"),
        (None, "KILLED", "without a last word"),
    ],
)
def test_the_status_tells_how_the_run_ended(run_dir: Path, last: Any, status: str, cause: str) -> None:
    with Spool(run_dir / "records.jsonl") as spool:
        spool.append(started())
        spool.append(step(1))
        if isinstance(last, str):
            spool.append_failure(last)
        elif last is not None:
            spool.append(last)
    assert upload(run_dir) == 0
    run = the_run(run_dir)
    assert run.info.status == status and cause in run.data.tags["status.cause"]


def test_a_living_run_is_running_and_its_death_is_noticed(run_dir: Path) -> None:
    trainer = subprocess.Popen(["sleep", "60"])
    spool_with(run_dir, started(), step(1))
    work = Uploader(run_dir, experiment="e", run_name="r", watch_pid=trainer.pid, drain_s=5.0)
    work._load()
    work._backlog.poll()
    assert work._alive() and work._work(False) and not work._work(False)
    assert the_run(run_dir).info.status == "RUNNING" and "heartbeat_s" in the_run(run_dir).data.tags
    trainer.kill()
    while work._alive():  # a zombie is dead, though nobody has waited for it
        time.sleep(0.01)
    assert work.run() == 0
    assert the_run(run_dir).info.status == "KILLED"
    trainer.wait()
    # The next attempt lives: its uploader takes the verdict back before it has anything to send.
    again = Uploader(run_dir, experiment="e", run_name="r", watch_pid=os.getpid())
    again._load()
    again._work(False)
    assert the_run(run_dir).info.status == "RUNNING"


def test_a_dead_server_costs_the_trainer_nothing_and_the_spool_stays(run_dir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://ada:secret@127.0.0.1:{port}"
    spool = Spool(run_dir / "records.jsonl")
    process = start_uploader(run_dir, uri, experiment="e", run_name="r", drain_s=1.0)
    before = time.perf_counter()
    for record in (started(), *(step(n) for n in range(1, 201)), finished(200)):
        spool.append(record)
    assert (time.perf_counter() - before) / 202 < 0.005
    assert process.wait(timeout=40) == 3
    written = "".join(p.read_text() for p in (run_dir / "tracking.json", run_dir / "tracking.log"))
    assert "secret" not in written and f"127.0.0.1:{port}" in written
    assert len(list(read(run_dir / "records.jsonl"))) == 203
    assert upload(run_dir) == 0  # and another server takes all of it later
    assert len(history(run_dir, "train/loss")) == 200


def test_the_one_line_says_what_is_not_uploaded(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool_with(run_dir, started(), step(1), finished(1))
    work = Uploader(run_dir, "http://ada:secret@127.0.0.1:9", experiment="e", drain_s=0.2, poll_s=0.02)
    assert work.run() == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "4 of 4 records are not in MLflow at http://127.0.0.1:9" in line
    assert "(no answer from the server)" in line and "normfree track import" in line and "secret" not in line


def test_a_record_that_the_server_refuses_does_not_hold_up_the_others(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spool_with(run_dir, started(), *(step(n) for n in range(1, 21)), finished(20))
    real = mlflow_client.send

    class Refused(Exception):
        error_code = "INVALID_PARAMETER_VALUE"

    def picky(client: Any, run_id: str, what: Any) -> None:
        if any(p.step == 7 for p in what.points):
            raise Refused("no sevens")
        real(client, run_id, what)

    monkeypatch.setattr(uploader, "send", picky)
    assert upload(run_dir) == 0
    assert [s for s, _, _ in history(run_dir, "train/loss")] == [n for n in range(1, 21) if n != 7]
    assert "refused 1 records" in capsys.readouterr().err
    assert the_run(run_dir).info.status == "FINISHED"


def test_what_is_not_finite_becomes_a_flag_and_urls_lose_their_passwords() -> None:
    translator = Translator()
    points = translator.translate({"attempt": 1, **step(4, loss=float("inf")).as_dict()}).points
    assert [p.value for p in points if p.key == "train/loss_not_finite"] == [1.0]
    assert "train/loss" not in {p.key for p in points}
    assert translator.translate({"attempt": 1, **started().as_dict()}).params["data.url"] == "s3://host/data"
    assert public("postgresql://a:p@ss@h/db?password=x&y=1") == "postgresql://h/db?password=...&y=1"
    for record in (
        Skipped(step=4, reason="loss", samples=3, keys=("a",)),
        PassedOver(step=0, url="u", reason="short"),
        Saved(step=4, url="s3://k:s@b/c", digest="d", size_bytes=5, seconds_s=1.0),
        Evaluation(step=4, split="val", weights="ema", loss=1.0, top1=0.5, top5=0.9, num_samples=10, seconds_s=1.0),
    ):
        upload = translator.translate({"attempt": 1, **record.as_dict()})
        assert upload.tags and not any("k:s" in value for value in upload.tags.values())
    assert translator.translate({"attempt": 1, "kind": "FromTheFuture"}).points == [] and translator.num_odd == 0
    assert translator.translate({"attempt": 1, "kind": "Saved"}).tags == {} and translator.num_odd == 1


def test_a_folder_is_refused_with_what_to_write_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for uri in (str(tmp_path), "mlruns", f"file://{tmp_path}"):
        with pytest.raises(UserError, match=r"write sqlite:///.*mlflow\.db"):
            resolve_uri(uri, tmp_path)
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert start_uploader_module.main([str(tmp_path)]) == 2 and "records.jsonl is missing" in capsys.readouterr().err


def trial(tracker: SweepTracker, digest: str, value: float = 0.5, status: str = "ok") -> None:
    rows = [{"step": float(n), "time_s": T0_S + n, "loss": 1.0 / (n + 1)} for n in range(5)]
    tracker.child(digest, f"trial {digest}", {"lr": 0.1}, rows, {"top1": value}, {"task": "digits"}, status)


def test_a_sweep_is_one_parent_and_no_child_is_doubled(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SweepTracker(None, "sweeps", "demo", run_dir)
    trial(first, "a")
    trial(first, "a")
    state = json.loads((run_dir / "tracking.json").read_text())
    (target,) = state.values()
    target["children"] = {}  # as if the driver had been killed before it wrote the child down
    (run_dir / "tracking.json").write_text(json.dumps(state))
    second = SweepTracker(None, "sweeps", "demo", run_dir)
    trial(second, "a")
    trial(second, "b", status="failed")
    (run_dir / "scorecard.csv").write_text("task\n")
    second.parent_summary({"suite": "demo"}, {"wins": 3.0}, [run_dir / "scorecard.csv"])
    second.parent_summary({"suite": "demo2"}, {"wins": 4.0}, [])
    second.close("ok")
    runs = {run.info.run_name: run for run in runs_of(run_dir)}
    assert sorted(runs) == ["demo", "trial a", "trial b"]
    assert {r.info.status for r in runs.values()} == {"FINISHED", "FAILED"}
    assert runs["trial b"].info.status == "FAILED" and runs["demo"].info.status == "FINISHED"
    assert runs["trial a"].data.tags["mlflow.parentRunId"] == runs["demo"].info.run_id
    assert runs["trial a"].data.metrics["final/top1"] == 0.5
    assert runs["demo"].data.params == {"suite": "demo"} and runs["demo"].data.tags["latest.suite"] == "demo2"
    client = connect(resolve_uri(None, run_dir))
    assert len(client.get_metric_history(runs["trial a"].info.run_id, "loss")) == 5


def test_a_dead_server_never_stops_a_sweep(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = SweepTracker("http://u:secret@127.0.0.1:9", "sweeps", "demo", run_dir)
    before = time.perf_counter()
    for n in range(50):
        trial(tracker, str(n))
    tracker.close("ok")
    assert time.perf_counter() - before < 10  # asked twice, not fifty times
    assert tracker.num_failures == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "50 trials are not in MLflow at http://127.0.0.1:9" in line and "secret" not in line


def test_pages_over_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no MLflow records at"):
        serve(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match="is a folder"):
        serve(str(tmp_path))
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another with --port"):
            serve(f"sqlite:///{tmp_path}/mlflow.db", port=taken.getsockname()[1])
    assert serve("https://ada:secret@tracking.example") == 0


def test_importing_the_tracker_loads_no_mlflow() -> None:
    code = (
        "import sys, orchestration.tracking.mlflow_client, orchestration.tracking.sweep_tracking; "
        "sys.exit('mlflow' in sys.modules)"
    )
    root = Path(mlflow_client.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_the_parent_of_a_sweep_shows_best_spread_failures_and_scorecard(run_dir: Path) -> None:
    def entry(seed: int, value: float | None, init: str = "pretrained", kind: str = "final") -> dict[str, Any]:
        error = None if value is not None else "out of memory"
        names = {"task": "digits", "method": "ridge", "init": init, "shots": 5, "seed": seed, "kind": kind}
        names |= {"model": "nfnet_tiny", "backbone": "nfnet_tiny"}
        return {**names, "digest": "d" * 64, "value": value, "error": error}

    entries = [entry(0, 0.9), entry(1, 0.8), entry(2, None), entry(0, 0.5, "scratch"), entry(0, 0.99, kind="search")]
    rows = [
        Row(
            task="digits",
            task_title="Digits",
            method="ridge",
            shots=5,
            metric="top1",
            pretrained=Estimate(0.85, 2, 0.75, 0.92, "logit t"),
            scratch=Estimate(0.5, 1),
            gain=Estimate(0.35, 1),
            verdict="wins",
            num_failed=1,
            protocol_digest="p",
        )
    ]
    tracker = SweepTracker(None, "sweeps", "demo", run_dir)
    tracker.parent_summary({}, sweep_summary.spread(entries), [], sweep_summary.tags(entries, rows))
    tracker.close("failed")
    parent = the_run(run_dir)
    assert parent.data.metrics["num_failed"] == 1 and parent.data.metrics["num_trials"] == 5
    spread = {k: parent.data.metrics[f"digits/ridge/5/pretrained_{k}"] for k in ("min", "max", "std", "n")}
    assert spread == {"min": 0.8, "max": 0.9, "std": pytest.approx(0.0707, abs=1e-4), "n": 2}
    assert (
        parent.data.tags["best.digits"] == "0.9000 final 0 digits ridge 5 pretrained"
    )  # the search's 0.99 is no result
    assert parent.data.tags["failures"] == "final 2 digits ridge 5 pretrained: out of memory"
    assert (
        "| Digits | top-1, % | ridge | 5 | 85.0 [75.0, 92.0] | 50.0 | +35.0 | 1 | - | wins, 1 failed |"
        in parent.data.tags["mlflow.note.content"].replace(sweep_summary.GAP, "").replace("\u00a0", " ")
    )
    assert "heartbeat_s" in parent.data.tags and parent.info.status == "FAILED"


def test_a_spool_in_an_object_store_is_put_together_by_another_machine(tmp_path: Path) -> None:
    url = f"memory://mirror-{os.getpid()}/run"
    here, there = tmp_path / "here", tmp_path / "there"
    with Spool(here / "records.jsonl") as spool:
        for number in range(1, 6):
            spool.append(step(number))
            with Mirror(here, url, own=("records.jsonl",)):  # leaving it pushes what is new, and nothing twice
                pass
    parts = objects.list_urls(objects.join(url, "spool"))
    assert len(parts) == 5 and pull(url, there)
    assert (there / "records.jsonl").read_bytes() == (here / "records.jsonl").read_bytes()
    assert not pull(url, there)
    with Spool(there / "records.jsonl") as spool:
        assert spool.attempt == 2
        spool.append(step(6))
    Mirror(there, url, own=("records.jsonl",)).push()
    with (here / "records.jsonl").open("a") as file:
        file.write('{"kind": "Step", "cut off": true}\n')
    assert pull(url, here)  # the machine that was cut off comes back: what the others did stands, its own is kept aside
    assert (there / "records.jsonl").read_bytes() == (here / "records.jsonl").read_bytes()
    assert len(list(here.glob("records.jsonl.*.aside"))) == 1


def test_no_password_of_a_url_reaches_the_spool(tmp_path: Path) -> None:
    with Spool(tmp_path / "records.jsonl", {"environment.command": "x"}) as spool:
        spool.append(started())
    assert "pass@" not in (tmp_path / "records.jsonl").read_text()
    assert "s3://host/data" in (tmp_path / "records.jsonl").read_text()


def test_a_picture_that_was_drawn_for_one_server_goes_to_the_next_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMFREE_PICTURES", "1")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "signal.png").touch()
    pictures = Pictures(tmp_path)
    pictures.begin()
    assert pictures.take() == [tmp_path / "pictures" / "signal.png"] and pictures.take() == []


def test_the_source_that_mlflow_shows_is_the_command_without_its_arguments_and_the_revision() -> None:
    attempt = {"kind": "Attempt", "attempt": 1, "time_s": T0_S, "code.revision": "abc"}
    tags = Translator().translate({**attempt, "environment.command": "normfree pretrain x --out s3://b/run"}).tags
    assert tags["mlflow.source.name"] == "normfree pretrain" and tags["mlflow.source.git.commit"] == "abc"
    command = "torchrun --nproc-per-node 2 /opt/bin/normfree pretrain x"
    assert Translator().translate({**attempt, "environment.command": command}).tags["mlflow.source.name"] == (
        "normfree pretrain"
    )
    assert not [tag for tag in Translator().translate(attempt).tags if tag.startswith("mlflow.")]


def test_what_a_start_does_otherwise_is_a_tag_of_that_attempt() -> None:
    translator = Translator()
    translator.translate({"kind": "Attempt", "attempt": 2, "time_s": T0_S})
    changed = {"kind": "Changed", "step": 4, "time_s": T0_S, "what": "length", "text": "8 steps long now, and was 4"}
    assert translator.translate(changed).tags == {"attempt.2.length": "8 steps long now, and was 4"}


def test_the_address_that_is_printed_leads_to_the_one_experiment_or_to_their_list(tmp_path: Path) -> None:
    client = connect(resolve_uri(None, tmp_path))
    assert mlflow_client.first_page(client) == "#/experiments?workflowType=machine_learning"
    made = client.create_experiment("pretrain")
    assert mlflow_client.first_page(client) == f"#/experiments/{made}/runs?workflowType=machine_learning"
    client.create_experiment("transfer")
    assert mlflow_client.first_page(client) == "#/experiments?workflowType=machine_learning"
