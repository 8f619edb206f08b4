"""No reader of records can end a run: not a console that nobody reads, nor records that have no room."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.run import record_readers
from orchestration.run.record_readers import FailureGuard, Readers
from orchestration.spool import spool
from pipeline.recipes import get
from pipeline.records import Notice, Phase
from pipeline.supervision import stop_signals
from tests.pipeline.processes import ROOT

EARLY = """
import os, signal, time
from pipeline.supervision.process_exit import run
def main():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(5)
    finally:
        print("unwound", flush=True)
    return 0
run(main)
"""


@pytest.mark.parametrize("error", [SystemExit(1), OSError(errno.EIO, "gone"), OSError(errno.ENOSPC, "full")])
def test_a_console_that_fails_is_said_once_and_left_alone(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    readers = Readers(get("nfnet_tiny_glyphs"), str(tmp_path / "run"), None)
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(readers._consoles[0], "read", fail)
    for _ in range(3):
        readers.read(Phase(step=0, name="starting"))
    assert len(calls) == 1 and capfd.readouterr().err.count("training goes on") == 1


def test_records_that_have_no_room_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    monkeypatch.setattr(record_readers, "RETRY_EVERY_S", 0.0)
    readers = Readers(get("nfnet_tiny_glyphs"), str(tmp_path / "run"), None)
    readers.read(Notice(step=1, text="training goes on"))
    (tmp_path / "run").unlink()  # there is room again
    readers.read(Notice(step=2, text="still"))
    readers.close(failed=None, waits=False)
    texts = [
        line.value.get("text") for line in spool.read(spool.records_folder(str(tmp_path / "run")) / "records.jsonl")
    ]
    assert "still" in texts


def test_what_a_reader_meets_ends_nothing_but_a_stop_of_the_user_does() -> None:
    with pytest.raises(KeyboardInterrupt):
        FailureGuard("x").run(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_stop_in_the_first_moments_gets_a_sentence_and_the_code_to_queue_again(name: str) -> None:
    command = [sys.executable, "-c", EARLY.format(name=name)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == stop_signals.EXIT_REQUEUE and done.stdout == "unwound\n"
    assert done.stderr == f"normfree: stopped by {name}; nothing was left to save, the same command again goes on\n"


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals.StopSignal():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    with stop_signals.StopSignal():
        assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_IGN, signal.SIG_DFL)


def test_a_sentence_for_a_terminal_that_is_gone_is_lost_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        monkeypatch.setattr(sys, "stderr", gone)
        stop_signals.say("nobody reads this")
    monkeypatch.setattr(sys, "stderr", None)
    stop_signals.say("nor this")
