"""Tracking URIs: what MLflow takes, and the SQLite file behind one, made whole or not at all."""

import contextlib
import importlib.metadata
import os
import re
import secrets
import shutil
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestration.spool.process_lock import only_one
from orchestration.spool.state_file import tell
from pipeline.errors import UserError
from pipeline.secrets import public

MADE_WITHIN_S = 120.0
"""How long another process may take to make the same file; it takes a second on an idle machine."""

SCHEMES = frozenset(["http", "https", "databricks", "databricks-uc", "uc", "sqlite", "postgresql", "mysql", "mssql"])
"""What MLflow 3.17 keeps runs in (mlflow.store.db.db_types, tracking._tracking_service.utils); plugins add to it."""


def sqlite_uri(file: str | os.PathLike[str]) -> str:
    """The URI of a SQLite file. What has a meaning in a URI (% ? #) is quoted: MLflow would make another file."""
    path = os.path.abspath(file)
    quoted = urllib.parse.quote(path, safe="/ ")
    # Behind a plain sqlite:/// MLflow 3.17 takes the quoted text for a path, and makes an empty folder of that name.
    return f"sqlite:///{path}" if quoted == path else f"sqlite+pysqlite:///{quoted}"


def sqlite_file(tracking_uri: str) -> Path | None:
    """The file behind a `sqlite:///` URI, None for any other URI."""
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", tracking_uri)
    return Path(urllib.parse.unquote(match[1])).resolve() if match else None


def resolve_uri(tracking_uri: str | None, run_dir: str | os.PathLike[str]) -> str:
    """The tracking URI to use, SQLite in `run_dir` for None. UserError for a folder, which MLflow 3 refuses (M1),
    for a scheme that it does not know, and for a SQLite database in memory, which ends with its process."""
    if not tracking_uri:
        return sqlite_uri(Path(run_dir).resolve() / "mlflow.db")
    if tracking_uri != "databricks" and (
        not re.match(r"[a-z][a-z0-9+.-]*:", tracking_uri, re.I) or tracking_uri.startswith("file:")
    ):
        folder = Path(tracking_uri.removeprefix("file://")).expanduser().resolve()
        raise UserError(
            f"the tracking URI {tracking_uri!r} is a folder, and MLflow keeps runs in folders no more; "
            f"write {sqlite_uri(folder / 'mlflow.db')}, or the address of a server (http://HOST:5000)"
        )
    scheme = tracking_uri.partition(":")[0].partition("+")[0].lower()
    if scheme not in SCHEMES and not importlib.metadata.entry_points(group="mlflow.tracking_store", name=scheme):
        raise UserError(
            f"the tracking URI {tracking_uri!r} begins with {scheme}:, where MLflow keeps no runs; give a server "
            "(http://HOST:5000) or a database (sqlite:////FOLDER/mlflow.db, postgresql://...)"
        )
    file = sqlite_file(tracking_uri)
    if scheme == "sqlite" and (file is None or ":memory:" in tracking_uri):
        raise UserError(
            f"the tracking URI {tracking_uri!r} names no file, and a database in memory ends with its process; "
            "write sqlite:////FOLDER/mlflow.db"
        )
    if file is None:
        return tracking_uri
    _, mark, options = tracking_uri.partition("?")
    try:
        urllib.parse.parse_qsl(options, strict_parsing=bool(mark))
    except ValueError:
        raise UserError(
            f"the tracking URI {tracking_uri!r} has {options!r} behind a ?, where options of SQLite stand (timeout=30); "
            "write %3F for a ? in the name of a file"
        ) from None
    # An absolute path: the uploader and MLflow's server work in other folders than this process.
    return sqlite_uri(file) + mark + options


def server_name(tracking_uri: str, folder: Path) -> str:
    """A server's name in `tracking.json`: without passwords, and with "." for the folder of the records, which may be moved."""
    return public(tracking_uri).replace(sqlite_uri(folder), "sqlite:///.")


def server_uri(name: str, folder: Path) -> str:
    """The tracking URI behind a `server_name`."""
    rest = name.removeprefix("sqlite:///.")
    return name if rest == name else sqlite_uri(folder) + rest


def chosen_uri(given: str | None) -> str | None:
    """What a command tells: what was given, else MLFLOW_TRACKING_URI, else None. UserError as `resolve_uri`, before anything
    is written."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or None
    return resolve_uri(uri, ".") if uri else None


def make_sqlite(tracking_uri: str) -> None:
    """Where the URI is of a SQLite file that is not there yet: MLflow's tables, in a file aside that is then renamed.

    MLflow makes its tables one after the other in the file itself; one that was cut short by a kill or a full disk is of no
    use for ever ("table ... already exists"). Such a file is put aside if it holds nothing of anybody's, and made anew. Nothing
    is done to any other file: an old one is MLflow's to migrate. UserError for a file that is no database.
    """
    file = sqlite_file(tracking_uri)
    if file is None or _has_content(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with only_one(file.with_name(f".{file.name}.lock"), lambda: False, wait_s=MADE_WITHIN_S, poll_s=0.05) as is_mine:
        if not is_mine:
            raise UserError(
                f"another process has been making {file} for {MADE_WITHIN_S:.0f} s; end it, and start again"
            )
        for rest in file.parent.glob(f".{file.name}.*.making*"):  # of a process that was killed here: the lock is ours
            rest.unlink()
        if file.exists() and file.stat().st_size:
            if _has_content(file) or not _is_unfinished(file):
                return
            aside = file.with_name(f"{file.name}.unfinished")
            os.replace(file, aside)
            tell(f"{file} was cut short when it was made, and holds nothing; it is {aside.name} now")
        making = _aside(file)
        with _without_waiting_for_the_disk():
            _open(making)
        with making.open("rb") as made:
            os.fsync(made.fileno())
        os.replace(making, file)


def _aside(file: Path) -> Path:
    """A new name each time: MLflow keeps an open store for each URI that it was ever asked for."""
    return file.with_name(f".{file.name}.{secrets.token_hex(4)}.making")


def _has_content(file: Path) -> bool:
    if not file.exists() or not file.stat().st_size:
        return False
    with contextlib.closing(sqlite3.connect(file)) as connection:
        for query in ("runs", "registered_models", "experiments where experiment_id != 0"):
            try:
                if connection.execute(f"select 1 from {query} limit 1").fetchone() is not None:
                    return True
            except sqlite3.OperationalError:  # no such table yet; or it is locked, and then somebody uses it
                continue
            except sqlite3.DatabaseError as error:
                text = f"{file} is no SQLite file ({error}); move it away, or give another --tracking-uri"
                raise UserError(text) from None
    return False


def _is_unfinished(file: Path) -> bool:
    copy = _aside(file)
    shutil.copyfile(file, copy)
    try:
        _open(copy)
    except Exception as error:  # of SQLAlchemy, alembic or MLflow; what else is wrong with it, its next user is told
        return re.search(r"already exists|no such table|duplicate column|out-of-date", str(error)) is not None
    finally:
        copy.unlink()
    return False


@contextlib.contextmanager
def _without_waiting_for_the_disk() -> Iterator[None]:
    """MLflow's migrations wait for the disk after each of hundreds of changes to a file that counts only once it is renamed."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def relax(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", relax)
    try:
        yield
    finally:
        event.remove(Engine, "connect", relax)


def _open(file: Path) -> None:
    """MLflow makes what is missing in the file when it is first asked something."""
    from mlflow.tracking import MlflowClient

    MlflowClient(sqlite_uri(file)).search_experiments(max_results=1)
