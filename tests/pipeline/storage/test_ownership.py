"""One owner a folder: the second is refused by name, a dead one is taken over, of several at once one wins."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.storage import conditional_put, objects, ownership, process_identity
from tests.pipeline.processes import ROOT

HOLD = (
    "import sys, time\nfrom pipeline.storage import ownership, process_identity\n"
    "with ownership.hold(sys.argv[1], 'run'):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


def owner_elsewhere(url: str, *, beat_s: float) -> ownership.Record:
    process = dataclasses.replace(process_identity.this_process(), machine="another", host="node7", pid=4321)
    record = ownership.Record(what="run", token="ab" * 16, since_s=beat_s, beat_s=beat_s, processes=(process,))
    objects.write_bytes(objects.join(url, ownership.NAME), record.to_json())
    return record


def test_the_second_is_refused_by_name_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    first = subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, cwd=ROOT)
    assert first.stdout and first.stdout.readline() == b"held\n"
    with (
        pytest.raises(UserError, match=rf"a run of process {first.pid} on .* since 20.* last sign of life"),
        ownership.hold(url, "run"),
    ):
        pass
    first.kill()
    first.wait()
    with ownership.hold(url, "run") as held:
        assert held.is_seen()
    assert not Path(url, ownership.NAME).exists()


def test_an_attempt_of_the_same_job_waits_for_the_one_before_and_a_strangers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ranks are started again the last of those before may still be leaving."""
    monkeypatch.setattr(ownership, "POLL_S", 0.1)
    url = str(tmp_path / "run")
    environment = {**os.environ, ownership.JOB: "mine"}
    program = HOLD.replace("600", "3")
    first = subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    assert first.stdout and first.stdout.readline() == b"held\n"
    monkeypatch.setenv(ownership.JOB, "another's")
    with pytest.raises(UserError, match="is in use"), ownership.hold(url, "run"):
        pass
    monkeypatch.setenv(ownership.JOB, "mine")
    with ownership.hold(url, "run") as held:
        assert held.is_seen() and first.wait() == 0


def test_a_process_number_that_went_to_another_process_is_no_owner(tmp_path: Path) -> None:
    process = dataclasses.replace(process_identity.this_process(), pid=os.getppid(), started="1")
    now_s = time.time()
    record = ownership.Record(what="run", token="ab" * 16, since_s=now_s, beat_s=now_s, processes=(process,))
    objects.write_bytes(tmp_path / ownership.NAME, record.to_json())
    with ownership.hold(str(tmp_path), "run") as held:
        assert held.is_seen() and held.token != record.token


def test_an_owner_elsewhere_lives_by_its_beat_whatever_its_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "LIMIT_S", 1.2)
    monkeypatch.setattr(ownership, "POLL_S", 0.1)
    url, clock_s = str(tmp_path), time.time() + 300
    record = owner_elsewhere(url, beat_s=clock_s)
    begin_s = time.monotonic()
    with ownership.hold(url, "run"):  # it stood still
        assert time.monotonic() - begin_s > 1.2
    owner_elsewhere(url, beat_s=clock_s)
    program = (
        "import sys, time\nfrom pathlib import Path\npath, text = Path(sys.argv[1]), sys.argv[2]\n"
        "for n in range(100):\n    time.sleep(0.5)\n    path.with_name('new').write_text(text.replace('4321', str(5000 + n)))\n"
        "    path.with_name('new').rename(path)\n"
    )
    beating = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / ownership.NAME), record.to_json().decode()]
    )
    with pytest.raises(UserError, match=r"a run of process 50\d\d on node7"), ownership.hold(url, "run"):
        pass
    beating.kill()
    beating.wait()


def test_a_record_of_long_ago_is_taken_over_at_once(tmp_path: Path) -> None:
    before = owner_elsewhere(str(tmp_path), beat_s=time.time() - 86400)
    with ownership.hold(str(tmp_path), "sweep") as held:
        assert held.is_seen() and held.token != before.token


def test_one_that_was_taken_over_while_it_stood_still_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    codes: list[int] = []
    with ownership.hold(str(tmp_path), "run", leave=codes.append):
        while not codes:
            owner_elsewhere(str(tmp_path), beat_s=time.time())  # again, where a beat under way has gone over it
            time.sleep(0.2)
    assert codes == [2]
    assert b"node7" in (tmp_path / ownership.NAME).read_bytes()  # and takes nothing with it


def test_what_a_process_gave_up_without_closing_is_its_own_again(tmp_path: Path) -> None:
    given_up = ownership.hold(str(tmp_path), "run")
    given_up.__enter__()
    with ownership.hold(str(tmp_path), "run") as again:
        assert again.is_seen()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match="cannot be written"), ownership.hold(str(place), "run"):
            pass


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ownership.hold(str(tmp_path / "run"), "run"):
        raise KeyError
    assert not (tmp_path / "run").exists()


def compete(url: str, number: int, before: Any, here: bool, barrier: Any, won: Any) -> None:
    barrier.wait()
    if conditional_put.replace(url, b"%d" % number, before, others_are_here=here):
        won.put(number)


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(("has_links", "here"), [(True, True), (True, False), (False, True)])
def test_of_several_at_once_one_wins(
    is_there: bool, has_links: bool, here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no hard links here")))
    url = str(tmp_path / "owner.json")
    if is_there:
        objects.write_bytes(url, b"dead")
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(4), context.SimpleQueue()
    arguments = [(url, n, conditional_put.read(url), here, barrier, won) for n in range(4)]
    competitors = [context.Process(target=compete, args=a) for a in arguments]
    for each in competitors:
        each.start()
    for each in competitors:
        each.join()
    winner = won.get()
    assert won.empty() and objects.read_bytes(url) == b"%d" % winner


def test_processes_whose_launcher_was_killed_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "POLL_S", 0.1)
    program = HOLD.replace("'run')", "'run', processes=[process_identity.this_process(launched=True)])").replace(
        "600", "2"
    )
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys\nsubprocess.run(sys.argv[1:])",
            sys.executable,
            "-c",
            program,
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert launcher.stdout and launcher.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="is in use"), ownership.hold(str(tmp_path), "run"):
        pass
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    with ownership.hold(str(tmp_path), "run"):
        pass
