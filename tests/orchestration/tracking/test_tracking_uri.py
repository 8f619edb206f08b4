"""Tracking URIs, and SQLite files that are whole or not there."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.spool.spool import Spool
from orchestration.spool.state_file import read_state
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.tracking_uri import make_sqlite, resolve_uri, sqlite_file, sqlite_uri
from orchestration.tracking.uploader import Uploader
from pipeline.errors import UserError


def test_the_status_of_a_folder_is_of_its_run_on_the_tracker_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = sqlite_uri(tmp_path / "all.db")
    for name in ("one", "two"):
        Spool(tmp_path / name / "records.jsonl").close()
        assert Uploader(tmp_path / name, uri, run_name=name, poll_s=0.02).run() == 0
    assert main(["track", "status", str(tmp_path / "one")]) == 0
    shown = capsys.readouterr().out
    assert uri in shown and " one" in shown and " two" not in shown
    assert main(["track", "status", str(tmp_path / "one"), "--tracking-uri", sqlite_uri(tmp_path / "all.db")]) == 0
    assert " two" not in capsys.readouterr().out
    (tmp_path / "two" / "tracking.json").unlink()
    assert main(["track", "status", str(tmp_path / "two"), "--tracking-uri", uri]) == 2


@pytest.mark.parametrize("name", ["a b%20c#?e", "lr?1", "100%", "ä+&=;", "plain"])
def test_mlflow_keeps_its_records_in_the_run_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    run = tmp_path / name
    uri = resolve_uri(None, run)
    assert sqlite_file(uri) == run / "mlflow.db" and resolve_uri(uri, "elsewhere") == uri
    connect(uri).create_experiment("e")
    assert (run / "mlflow.db").exists() and [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("uri", ["ftp://host/x", "s3://bucket/mlruns", "sqlite:///", "sqlite://", "sqlite:///:memory:"])
def test_a_uri_where_mlflow_keeps_nothing_is_refused_before_anything_starts(uri: str) -> None:
    with pytest.raises(UserError, match=r"sqlite:////FOLDER/mlflow\.db"):
        resolve_uri(uri, "run")
    for good in ("http://h:5000", "postgresql+psycopg2://h/db", "databricks://profile", "databricks"):
        assert resolve_uri(good, "run") == good


def test_a_file_with_options_is_found_from_any_folder_and_a_bare_question_mark_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = resolve_uri("sqlite:///a.db?timeout=30", "run")
    assert uri == f"sqlite:///{tmp_path}/a.db?timeout=30" and resolve_uri(uri, "run") == uri
    with pytest.raises(UserError, match="write %3F"):
        resolve_uri("sqlite:///runs/lr?1.db", "run")


@pytest.mark.parametrize("is_early", [True, False])
def test_a_store_that_was_cut_short_is_made_anew_and_kept_aside(
    is_early: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.store.db_migrations.versions.e1f2a3b4c5d6_add_budget_policies_table import down_revision

    file = tmp_path / "mlflow.db"
    make_sqlite(sqlite_uri(file))
    with sqlite3.connect(
        file
    ) as connection:  # as a kill leaves it that comes between a table and the note that it is made
        connection.execute("update alembic_version set version_num = ?", (down_revision,))
        if is_early:
            connection.execute("drop table jobs")
    connect(sqlite_uri(file)).create_experiment("e")
    assert (tmp_path / "mlflow.db.unfinished").exists() and "cut short" in capsys.readouterr().err


def test_a_store_with_runs_is_never_moved_and_an_empty_file_is_filled(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.touch()
    client = connect(sqlite_uri(file))
    run = client.create_run(client.create_experiment("e")).info.run_id
    with sqlite3.connect(file) as connection:
        connection.execute("update alembic_version set version_num = '451aebb31d03'")
    make_sqlite(sqlite_uri(file))
    with sqlite3.connect(file) as connection:
        assert connection.execute("select run_uuid from runs").fetchall() == [(run,)]


def test_a_process_that_is_killed_while_it_makes_a_store_leaves_none(tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path / "mlflow.db")
    code = f"from orchestration.tracking.tracking_uri import make_sqlite; make_sqlite({uri!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    while not (making := list(tmp_path.glob("*.making"))) or not making[0].stat().st_size:
        assert process.poll() is None and not time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    make_sqlite(uri)
    assert not list(tmp_path.glob("*.making*"))


def test_what_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, but a text that is long enough" * 30)
    with pytest.raises(UserError, match=r"mlflow\.db is no SQLite file"):
        make_sqlite(sqlite_uri(tmp_path / "mlflow.db"))


@pytest.mark.parametrize(
    "command", ["pretrain nfnet_tiny_glyphs --data.url none", "transfer none --suite demo --data-root none"]
)
def test_a_folder_as_tracking_uri_is_one_sentence_before_anything_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--out", "run", "--tracking-uri", "./mlruns"]) == 2
    assert "is a folder" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", '{"a": {"run_id"', "[1, 2]", '{"a": 1}', "\x00" * 40])
def test_a_damaged_account_of_a_server_is_put_aside_and_reported(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tracking.json").write_text(content)
    assert read_state(tmp_path / "tracking.json") == {}
    (aside,) = tmp_path.iterdir()
    assert aside.name.endswith(".damaged") and aside.read_text() == content and aside.name in capsys.readouterr().err
