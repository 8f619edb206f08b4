"""The command that a run records is the one that was typed."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from pipeline import provenance
from pipeline.supervision.rank_environment import TORCHRUN


@pytest.mark.parametrize(
    ("words", "on_path", "expected"),
    [
        (["python", "BIN/normfree", "pretrain", "a b"], True, "normfree pretrain 'a b'"),
        (["python", "BIN/normfree", "pretrain", "x"], False, "BIN/normfree pretrain x"),
        (["python3", "-m", "orchestration.cli", "pretrain", "x"], True, "python3 -m orchestration.cli pretrain x"),
        (["python", "mine.py", "--out", "run"], True, "python mine.py --out run"),
    ],
)
def test_what_was_typed(
    words: list[str], on_path: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("normfree", "torchrun"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.delenv(provenance.COMMAND, raising=False)
    monkeypatch.delenv(TORCHRUN, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "/nowhere")
    monkeypatch.setattr(sys, "orig_argv", [word.replace("BIN", str(tmp_path)) for word in words])
    assert provenance.command() == expected.replace("BIN", str(tmp_path))
    monkeypatch.setenv(provenance.COMMAND, "normfree pretrain typed")  # a rank's own words are the launcher's
    assert provenance.facts()["environment.command"] == "normfree pretrain typed"


def test_under_torchs_launcher_it_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(provenance.COMMAND, raising=False)
    monkeypatch.setenv(TORCHRUN, "none")
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if not parent.exists():
        pytest.skip("no /proc")
    typed = parent.read_bytes().decode().split("\0")[:-1]
    assert shlex.split(provenance.command())[-1] == typed[-1]


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(provenance.COMMAND, raising=False)
    monkeypatch.delenv(TORCHRUN, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py", "--tracking-uri", "https://me:hunter2@host/"])
    assert "hunter2" not in provenance.command()
