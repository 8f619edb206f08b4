"""What a rank writes is in its log, whatever ends it; the console of many ranks shows the first errors, once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.run.folded import MAX_LINES, Folded
from orchestration.spool import rank_logs
from orchestration.spool.rank_logs import KEPT, LogName, format_line, is_consequence, is_error, parse_line, parse_name

SCRIPT = Path(__file__).with_name("rank_with_log.py")
ROOT = Path(__file__).parents[3]


def start(out: Path, *words: str, rank: int = 0, size: int = 1, **variables: str) -> "subprocess.Popen[str]":
    world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    environment = {**os.environ, **{k: str(v) for k, v in world.items()}, **variables, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out), *words], env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True
    )


def log_of(out: Path, rank: int = 0) -> str:
    (path,) = (out / rank_logs.FOLDER).glob(f"rank-{rank:05d}.*.log")
    return path.read_text()


def test_a_log_has_every_word_with_its_time_and_the_console_has_them_in_order(tmp_path: Path) -> None:
    console = start(
        tmp_path, "done", "a token: hunter2secret", "https://me:pw@host/x", SOME_TOKEN="hunter2secret"
    ).communicate()[0]
    assert console.index("a word from elsewhere") < console.index("after the log") and "\0" not in console
    log = log_of(tmp_path)
    lines = [parse_line(line) for line in log.splitlines()]
    assert all(lines) and lines[0] is not None and lines[0].source == "own"
    texts = [line.text for line in lines if line]
    for text in ("a word from Python, before the run's folder is its own", "a word from elsewhere", "a token: ..."):
        assert text in texts
    assert "hunter2secret" not in log and "me:pw" not in log and "after the log" not in log


def test_the_last_words_of_a_killed_rank_are_there_and_that_it_was_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "killed")
    console = process.communicate()[0]
    assert process.returncode == -9 and "ended without a last word" in console
    *_, word, gone = [line.text for raw in log_of(tmp_path).splitlines() if (line := parse_line(raw))]
    assert word == "the last word" and "ended without a last word: killed" in gone


def test_a_run_that_is_refused_while_it_starts_leaves_no_log(tmp_path: Path) -> None:
    assert "it cannot be" in start(tmp_path, "refused").communicate()[0]
    assert not list(tmp_path.iterdir())


def test_an_error_of_several_ranks_is_one_line_of_the_console_and_stands_in_each_log(tmp_path: Path) -> None:
    ranks = [start(tmp_path, "failed", "a line of no interest", rank=r, size=5) for r in range(1, 5)]
    console = "".join(rank.communicate()[0] for rank in ranks)
    assert len(re.findall(r"\[rank \d\] normfree: rank \d failed: ValueError", console)) == 1
    assert re.search(r"\[rank \d\] 3 other ranks said the same", console) and "no interest" not in console
    for r in range(1, 5):
        log = log_of(tmp_path, r)
        assert f"rank {r} failed: ValueError: the cause" in log and "own ValueError: the cause" in log
        assert "a line of no interest" in log and "ended without" not in log


def test_a_rank_shows_few_errors_and_no_consequences(tmp_path: Path) -> None:
    said: list[str] = []
    folded = Folded(tmp_path, 3, write=said.append)
    folded.show("RuntimeError: [gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4711")
    for word in ("one", "two", "three", "four", "five"):
        folded.show(f"ValueError: {word}")
        folded.show(f"ValueError: {word}")
    assert said == [f"[rank 3] ValueError: {word}\n" for word in ("one", "two", "three")] and len(said) == MAX_LINES


def test_names_and_lines_come_back_as_they_were_written() -> None:
    name = LogName(3, "20261128T210655Z", "node-7.rack_2", 4711, True)
    assert parse_name(str(name)) == name and parse_name("rank-00003.log") is None and parse_name("../rank") is None
    line = rank_logs.Line(1795900015.25, "err", "a: b")
    assert parse_line(format_line(line).rstrip("\n")) == line and parse_line("half a line") is None


def test_the_newest_logs_of_a_rank_stay() -> None:
    names = [str(LogName(1, f"20261128T2100{i:02d}Z", "h", i)) for i in range(KEPT + 3)]
    other = str(LogName(2, "20200101T000000Z", "h", 1))
    assert [n.pid for n in rank_logs.too_old([*names, other, "x"], [1])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "error", "consequence"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", True, False),
        ("normfree: rank 3 failed: ValueError: x (--debug shows where)", True, False),
        (
            "normfree: rank 3 (process 1 on h) ended without a last word: killed, most likely for its memory, or it crashed",
            True,
            False,
        ),
        ("RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer", True, True),
        ("normfree: waiting for MLflow at sqlite:///x to take the last records (30 s at most)", False, False),
        ("step 5/10  left 3 s  loss 2.3", False, False),
        ("no errors so far", False, False),
    ],
)
def test_which_lines_speak_of_a_failure(text: str, error: bool, consequence: bool) -> None:
    assert (is_error(text), is_consequence(text)) == (error, consequence)
