"""A rank that ends as it should leaves its code in a file, one that fails ends with it."""

import os
from pathlib import Path

import pytest

from orchestration.run import rank_end


def test_codes_that_ask_for_no_restart_go_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_end.leave(75, is_signalled=True) == 75  # nobody asked for a file
    monkeypatch.setenv(rank_end.FOLDER, str(tmp_path))
    for code in (1, 76):
        assert rank_end.leave(code, is_signalled=False) == code
    assert rank_end.read(tmp_path, os.getpid()) is None
    for code in (0, 2, 75):
        assert rank_end.leave(code, is_signalled=True) == 0
        assert rank_end.read(tmp_path, os.getpid()) == rank_end.RankEnd(code, True)


def test_where_no_file_can_be_written_the_code_is_the_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rank_end.FOLDER, "/nowhere")
    assert rank_end.leave(75, is_signalled=False) == 75
