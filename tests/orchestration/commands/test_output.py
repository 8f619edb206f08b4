"""What commands print of names from outside moves no cursor and fakes no line."""

from types import SimpleNamespace

import pytest

from orchestration.cli import main
from orchestration.commands.output import say
from pipeline.models import classify

HOSTILE = "ant\x1b]0;owned\x07\x1b[2J\nnormfree: done\u202e"
SHOWN = r"ant\x1b]0;owned\x07\x1b[2J\nnormfree: done\u202e"


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE, "b")
    assert capsys.readouterr().out == f"{SHOWN}\nb\n"


def test_classes_of_a_checkpoint_are_shown_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = SimpleNamespace(image="a.png", error=None, ranked=[(HOSTILE, 0.75)])
    bad = [SimpleNamespace(image=f"{n}{HOSTILE}", error=HOSTILE, ranked=[]) for n in range(2)]
    monkeypatch.setattr(classify, "predictions", lambda *_: iter([good, *bad]))
    assert main(["classify", "RUN", "a.png"]) == 2
    printed = capsys.readouterr()
    assert printed.out == f"a.png: {SHOWN} 75.0%\n"
    assert f"0{SHOWN} cannot be classified: {SHOWN}" in printed.err and "\x1b" not in printed.err
