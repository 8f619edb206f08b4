"""`normfree status` and `normfree logs` say of a folder what is in it, whoever wrote it and whatever became of them."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.cli import main
from orchestration.operations import folders
from orchestration.operations.run_folder import log_files
from orchestration.operations.status import RunStatus, run_status
from orchestration.operations.timeline import Event, first_error, folded, ranks_text, timeline
from orchestration.spool.mirror import Mirror
from orchestration.spool.rank_logs import FOLDER, Line, LogName, format_line, stamp
from orchestration.spool.spool import Spool, records_folder
from pipeline.records import Deviation, Record, SaveFailed, Stopped
from pipeline.storage import listing, objects, ownership
from pipeline.storage.process_identity import Process
from tests.orchestration.tracking.test_tracking import finished, started, step
from tests.s3_server import bucket
from transfer.sweep.entry import Trial, entry
from transfer.sweep.ledger import Ledger, SweepInfo

ROOT = Path(__file__).parents[3]
MakeCheckpoint = Callable[..., str]
FACTS = {"environment.command": "normfree pretrain x", "environment.folder": "/a folder"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with bucket(tmp_path_factory.mktemp("s3")) as url:
        yield url


def write(url: str, *starts: list[Record | str]) -> None:
    """A run's records: a list for each start; a text is how it failed."""
    for records in starts:
        with Spool(records_folder(url) / "records.jsonl", FACTS) as spool:
            for record in records:
                spool.append_failure(record) if isinstance(record, str) else spool.append(record)


def log(url: str, rank: int, *lines: tuple[float, str], host: str = "h", pid: int = 1) -> Path:
    folder = records_folder(url) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(LogName(rank, stamp(lines[0][0]), host, pid))
    path.write_text("".join(format_line(Line(time_s, "err", text)) for time_s, text in lines))
    return path


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(list(words)) == code
    streams = capsys.readouterr()
    return streams.err if code else streams.out


def test_a_finished_run(tmp_path: Path, make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path)
    url = str(tmp_path / "run")
    write(url, [started(0), step(1), step(2), finished(2)])
    text = said(capsys, "status", url)
    for part in ("finished", "step 7", "sizes are right", "start 1", checkpoint):
        assert part in text
    assert "go on" not in text
    assert "all bytes verify" in said(capsys, "status", url, "--verify")
    found = json.loads(said(capsys, "status", url, "--json"))
    assert found["state"] == "finished" and found["checkpoint"]["verified"] == "sizes" and not found["is_alive"]


def test_a_checkpoint_that_does_not_stand_is_said(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Path(make_checkpoint(tmp_path))
    url, newer = str(tmp_path / "run"), checkpoint.with_name("step_00000009")
    shutil.copytree(checkpoint, newer)
    weights = next(newer.glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    found = run_status(url).checkpoint
    assert (
        found is not None and found.step == 7 and "of" in found.passed_over[0] and weights.name in found.passed_over[0]
    )
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the right size: all bytes must be read
    by_size, by_bytes = run_status(url).checkpoint, run_status(url, verify=True).checkpoint
    assert by_size is not None and by_size.url == str(newer)
    assert by_bytes is not None and by_bytes.url == str(checkpoint) and len(by_bytes.passed_over) == 1


def test_each_start_says_how_it_ended_and_the_troubles_are_counted(tmp_path: Path) -> None:
    url = str(tmp_path)
    failed = SaveFailed(step=2, url="u", reason="no space left", num_missed=1)
    odd = Deviation(step=3, what="losses", text="they jump", is_certain=False, score=9.0)
    write(
        url,
        [started(0), step(1)],
        [started(1), failed, "OSError: gone"],
        [started(1), odd, Stopped(step=3, checkpoint=None, reason="SIGTERM")],
    )
    found = run_status(url)
    assert [s.ending for s in found.starts] == ["gone", "failed", "stopped"] and "OSError: gone" in found.starts[1].why
    assert found.state == "stopped" and found.troubles == {"SaveFailed": 1, "Deviation": 1}
    assert found.resume_command == "cd '/a folder' && normfree pretrain x"


def test_a_run_lives_while_its_owner_does(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with ownership.hold(url, "run"):
        write(url, [started(0), step(1)])
        found = run_status(url)
        assert found.is_alive and found.state == "running" and found.resume_command == "" and found.left_s is not None
        assert found.owner is not None and found.owner["pid"] == os.getpid()
    assert run_status(url).state == "gone"


def test_an_owner_elsewhere_is_watched_where_its_clock_may_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 1.0)
    monkeypatch.setattr(ownership, "POLL_S", 0.05)
    elsewhere = Process("another machine", "node7", 1, "then")

    def beat(age_s: float) -> None:
        beat_s = time.time() - age_s
        record = ownership.Record(what="run", token="t", since_s=1.0, beat_s=beat_s, processes=(elsewhere,))
        objects.write_bytes(tmp_path / ownership.NAME, record.to_json())

    def seen(age_s: float) -> bool:
        beat(age_s)
        owner = ownership.look(str(tmp_path))
        assert owner is not None
        return ownership.is_alive(str(tmp_path), owner)

    assert seen(5.0) and not seen(300.0) and not seen(1e6)
    beats = threading.Timer(0.5, beat, (299.0,))  # its clock is five minutes behind, and it lives
    beats.start()
    assert seen(300.0)
    beats.join()


def test_a_folder_of_many_is_a_line_each_and_datasets_are_not_looked_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "deep/c"):
        write(str(tmp_path / name), [started(0), step(1), finished(1)])
    (tmp_path / "data" / "inside").mkdir(parents=True)
    (tmp_path / "data" / "manifest.json").write_text("{}")
    looked: list[str] = []
    items = listing.items
    monkeypatch.setattr(listing, "items", lambda url: looked.append(str(url)) or items(url))
    lines = said(capsys, "status", str(tmp_path)).splitlines()
    assert len(lines) == 3 and all("finished" in line for line in lines) and lines[2].endswith("deep/c")
    assert not any("inside" in place for place in looked)
    assert "there are more than 2" in said(capsys, "status", str(tmp_path), "--limit", "2")


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run and no sweep" in said(capsys, "status", str(tmp_path), code=2)
    assert "there is no run at" in said(capsys, "logs", str(tmp_path), code=2)
    write(str(tmp_path), [started(0)])
    log(str(tmp_path), 0, (1.0, "x"))
    assert "a log of ranks 0 to 0, and none of rank 7" in said(capsys, "logs", str(tmp_path), "--rank", "7", code=2)


# --- the timeline -------------------------------------------------------------------------------------------------------


def test_the_first_error_in_time_is_first_and_what_follows_from_it_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, now = str(tmp_path), time.time()
    write(url, [started(0), step(1), "RuntimeError: Connection closed by peer"])
    for rank in range(64):
        log(url, rank, (now + 1, f"RuntimeError: Connection closed by peer [10.0.0.{rank}]:{4000 + rank}"))
    log(url, 5, (now + 0.5, "torch.OutOfMemoryError: CUDA out of memory"), host="node5", pid=2)
    lines = said(capsys, "logs", url).splitlines()
    assert lines[0].startswith("first error") and "rank 5" in lines[0] and "OutOfMemoryError" in lines[0]
    assert len(lines) < 10 and any("ranks 0-63" in line for line in lines)  # 64 ranks are one screen
    errors = said(capsys, "logs", url, "--errors").splitlines()
    assert "OutOfMemoryError" in errors[1] or "failed" in errors[1]
    assert said(capsys, "logs", url, "--rank", "5").count("rank 5") == 3  # the first error and both lines


FOLLOWED = ("of now", "a line", "came later", "they jump", "a rank froze")


@pytest.mark.parametrize(
    ("words", "shown"),
    [("", FOLLOWED), ("--errors", ("of now", "they jump", "a rank froze")), ("--rank 1", ("of now", "a line"))],
)
def test_what_comes_is_followed_until_it_is_interrupted(
    words: str,
    shown: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, now = str(tmp_path), time.time()
    write(url, [started(0)])
    log(url, 1, (now, "RuntimeError: of old"))
    odd = Deviation(step=3, what="losses", text="they jump", is_certain=False, score=9.0)

    def comes() -> None:
        log(url, 1, (now, "RuntimeError: of old"), (now + 1, "a line"), (now + 2, "RuntimeError: of now"))
        log(url, 2, (now + 3, "of a rank that came later"))

    def reports() -> None:
        write(url, [started(1), odd])
        report = {"time_s": now - 3600, "frozen": []}  # by a clock that is an hour late
        (tmp_path / "hang-1.json").write_text(json.dumps(report))

    def interrupt() -> None:
        raise KeyboardInterrupt

    meanwhile = iter([comes, reports, lambda: None, interrupt])
    clock = SimpleNamespace(sleep=lambda _: next(meanwhile)())
    monkeypatch.setattr("orchestration.operations.logs.time", clock)
    assert main(["logs", url, "--follow", *words.split()]) == 130
    text = capsys.readouterr().out.rpartition("of old")[2]
    assert [part for part in FOLLOWED if part in text] == [*shown]
    assert all(text.count(part) == 1 for part in shown)


def test_events_of_one_timeline_are_in_order_and_the_same_line_of_many_is_one() -> None:
    lines = [Event(time_s=10 + r / 100, text=f"warning {r}", kind="line", ranks=(r,)) for r in (0, 1, 2, 7)]
    late = Event(time_s=60, text="warning 9", kind="line", ranks=(9,))
    found = folded([late, *lines, Event(time_s=5, text="start", kind="Attempt")])
    assert [(e.time_s, ranks_text(e.ranks)) for e in found] == [(5, ""), (10, "ranks 0-2,7"), (60, "rank 9")]


def test_the_last_starts_errors_come_before_an_earlier_ones() -> None:
    def event(time_s: float, text: str, kind: str = "line", **facts: Any) -> Event:
        return Event(time_s=time_s, text=text, kind=kind, **facts)

    events = [event(1, "", "Attempt"), event(2, "old", is_error=True), event(3, "", "Attempt")]
    found = first_error(events)
    assert found is not None and found.text == "old"  # nothing since
    events += [event(4, "follows", is_error=True, is_consequence=True), event(5, "cause", is_error=True)]
    found = first_error(events)
    assert found is not None and found.text == "cause"


def make_sweep(url: str, **more: Any) -> Ledger:
    """Four trials of six, one of them failed."""
    facts = {
        "suite": "demo",
        "suite_digest": "s",
        "checkpoint_url": "runs/a",
        "checkpoint_digest": "a" * 64,
        "model": "m",
    }
    sweep = Ledger(url)
    info = SweepInfo(
        **facts, started_s=1.0, command="normfree transfer x", hardware="", num_seeds=2, not_run=[], **more
    )
    sweep.claim(info)
    for seed, value in enumerate((0.5, 0.75, 0.625, None)):
        what: dict[str, Any] = {"kind": "final", "task": "digits", "method": "ridge", "init": "pretrained", "shots": 5}
        digests = {"protocol_digest": "p", "data_digest": "d", "checkpoint_digest": "a" * 64}
        trial = Trial(**what, seed=seed, hyperparameters={}, **digests)
        sweep.write(entry(trial, task_title="D", checkpoint_url="", value=value, error=None if value else "it broke"))
    return sweep


def test_a_sweep_says_how_many_trials_are_over_failed_and_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "sweep")
    sweep = make_sweep(url, num_trials=6, folder="/a folder")
    sweep.tell_running([{"name": "digits-ridge", "since_s": 1.0}])
    text = said(capsys, "status", url)
    for part in (
        "trials  4 of 6 are over, 1 of them failed",
        "it broke",
        "digits: top-1 75.0 %",
        "cd '/a folder' && normfree transfer x",
    ):
        assert part in text
    assert "running" not in text.replace("not running", "")  # nobody lives, so nothing runs
    with ownership.hold(url, "sweep"):
        found = json.loads(said(capsys, "status", url, "--json"))
    assert found["state"] == "running" and found["running"] == ["digits-ridge"] and found["resume_command"] == ""
    assert found["left_s"] is not None and found["num_done"] == 4
    assert "trials 4/6" in said(capsys, "status", str(tmp_path))


# --- in a bucket --------------------------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_is_read_from_another_machine(
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make_checkpoint: MakeCheckpoint,
) -> None:
    url = f"{store}/runs/c100"
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "trainer"))
    write(url, [started(0), step(1), step(2), "the run ended"])
    log(url, 3, (time.time() - 0.001, "ValueError: it broke"), host="node3")
    mirror = Mirror(records_folder(url), url, own=("records.jsonl",))
    mirror.push()
    mirror.push_logs()
    objects.write_bytes(f"{url}/run.yaml", b"name: x\n")
    checkpoint = Path(make_checkpoint(tmp_path))
    for file in checkpoint.iterdir():
        objects.put_file(file, f"{url}/checkpoints/step_00000007/{file.name}")
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "reader"))
    text = said(capsys, "status", url)
    for part in ("failed", "the run ended", "first error", "step 7", "sizes are right", "go on"):
        assert part in text
    assert "all bytes verify" in said(capsys, "status", url, "--verify")
    lines = said(capsys, "logs", url).splitlines()
    assert any("rank 3" in line and "ValueError: it broke" in line for line in lines) and any(
        "start 1" in line for line in lines
    )
    (line,) = said(capsys, "status", f"{store}/runs").splitlines()
    assert line.startswith("failed") and line.endswith(url)


def test_looking_into_a_bucket_costs_requests_for_its_runs_and_not_for_their_objects(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path))
    url = f"{store}/many"
    for run in range(2):
        objects.write_bytes(f"{url}/r{run}/run.yaml", b"name: x\n")
        for part in range(30):
            objects.write_bytes(f"{url}/r{run}/checkpoints/step_00000001/part-{part:05d}-of-00030.json", b"{}")
    asked: list[str] = []
    items = listing.items
    monkeypatch.setattr(listing, "items", lambda place: asked.append(str(place)) or items(place))
    found, is_all = folders.many(url, limit=10, progress=lambda *_: None)
    assert is_all and len(found) == 2 and all(isinstance(f, RunStatus) and f.state == "new" for f in found)
    assert len(asked) <= 1 + 2 * 4


# --- typed --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_that_status_prints_goes_on_when_it_is_typed(digits: str, tmp_path: Path) -> None:
    """A run is stopped, and the line after "go on" is given to a shell in another folder."""
    words = f"-m orchestration.cli pretrain nfnet_tiny_glyphs --data.url {digits} --out run --num-processes 2 --global_batch 16"
    words += " --duration '40 steps' --optim.warmup '1 steps' --log_every_steps 1 --save_every '5 steps'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NORMFREE_WAIT_FOR_TRACKER": "0", "PYTHONSAFEPATH": "1"}
    first = subprocess.Popen(
        [sys.executable, *shlex.split(words)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("saved  step 5"):
            first.send_signal(signal.SIGTERM)
            break
    first.communicate(timeout=300)
    assert first.returncode == 75
    found = run_status(str(tmp_path / "run"))
    assert (
        found.state == "stopped" and found.resume_command.startswith(f"cd {tmp_path}") and found.checkpoint is not None
    )
    assert {file.name.rank for file in log_files(found.url)} == {0, 1}
    subprocess.run(found.resume_command, shell=True, cwd="/", env=environment, check=True, timeout=600)
    found = run_status(found.url)
    assert found.state == "finished" and len(found.starts) == 2 and (found.starts[1].step or 0) >= 5
    events = timeline(found.url)
    assert [e.kind for e in events if e.kind in ("Attempt", "Stopped", "Finished")] == [
        "Attempt",
        "Stopped",
        "Attempt",
        "Finished",
    ]
