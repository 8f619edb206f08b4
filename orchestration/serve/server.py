"""`normfree ui`: MLflow's pages over a run's or sweep's records, on this machine only unless asked otherwise."""

import contextlib
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

from orchestration import child_process
from orchestration.serve import addresses, mlflow_server
from orchestration.serve.import_records import records_of
from orchestration.tracking.heartbeat import keep_sweeping
from orchestration.tracking.mlflow_client import connect, first_page
from orchestration.tracking.tracking_uri import make_sqlite, resolve_uri, sqlite_file
from pipeline import places
from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage import objects

START_S = 180.0  # a first start makes the tables
STOP_S = 10.0
REFRESH_S = 300.0  # as often as a run in an object store adds to its records there


def serve_folder(url: str, host: str = "127.0.0.1", port: int = 5000) -> int:
    """As `serve`, over the records of a run or sweep folder; what one in an object store adds is brought as it comes."""
    if not objects.is_local(url):
        print(terminal(f"reading the records of {url} ..."), file=sys.stderr, flush=True)
    uri = records_of(url)
    refresh = None if objects.is_local(url) else partial(records_of, url)
    return serve(uri, host, port, refresh=refresh)


def serve(
    tracking_uri: str, host: str = "127.0.0.1", port: int = 5000, *, refresh: Callable[[], object] | None = None
) -> int:
    """Serves until Ctrl-C and returns the exit status; a server's own URI is only printed, for it has pages already.

    `refresh` is called every REFRESH_S meanwhile. UserError for a SQLite file that does not exist (MLflow would make an
    empty one and show nothing), for a folder, and for a port in use. Port 0 takes a free one.
    """
    if tracking_uri.startswith(("http://", "https://")):
        print(terminal(f"MLflow is there already: {public(tracking_uri)}"))
        return 0
    uri = resolve_uri(tracking_uri, ".")
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(
            f"no MLflow records at {file}; give the folder of a run or sweep that has started, or its URI; where it told "
            "another tracker, 'normfree track import FOLDER' makes them from what the folder holds"
        )
    port, token = free_port(host, port), secrets.token_urlsafe(24)
    print("starting MLflow ...", file=sys.stderr, flush=True)
    make_sqlite(uri)  # anew, where it was cut short
    return run_server(
        "own",
        {mlflow_server.TOKEN: token, mlflow_server.ARTIFACTS: _artifacts(file)},
        host=host,
        port=port,
        uri=uri,
        refresh=refresh,
        # Whoever calls from another machine needs the token; this user's own programs here do not.
        query="" if addresses.is_loopback(host) else f"/?token={token}",
    )


def run_server(
    form: str,
    environment: dict[str, str],
    *,
    host: str,
    port: int,
    uri: str,
    workers: int = 1,
    refresh: Callable[[], object] | None = None,
    query: str = "",
) -> int:
    """An MLflow server until Ctrl-C or its own end.

    Args:
        form: "own" or "team", with the variables of its `environment`.
        uri: of the store behind it, where silent runs are looked after.
        query: what its printed address ends with.
    """
    # A group of its own, because the server may have children that do not end with it.
    process = child_process.start(
        "orchestration.serve.mlflow_server",
        [form, host, str(port), str(workers)],
        environment={
            # By the environment: it may hold a password, and command lines are for everybody to read.
            "MLFLOW_BACKEND_STORE_URI": uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "PYTHONWARNINGS": "ignore",
            **environment,
        },
        own_session=True,
    )
    scheme = "https" if mlflow_server.CERTIFICATE in environment else "http"
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = threading.Event()
    try:
        _wait(process, f"{scheme}://{host}:{port}")
        # Where nobody trains any more nobody else could say that the last run died with its machine.
        threading.Thread(target=keep_sweeping, args=(lambda: connect(uri), end), daemon=True).start()
        if refresh is not None:
            threading.Thread(target=_keep_refreshing, args=(refresh, end), daemon=True).start()
        address = f"{scheme}://{addresses.reachable(host)}:{port}{query}"
        print(terminal(f"MLflow shows {public(uri)} at {address} (Ctrl-C ends it)"), flush=True)
        with contextlib.suppress(Exception):  # the pages are there all the same
            print(
                terminal(f"runs and sweeps: {address if query else address + '/'}{first_page(connect(uri))}"),
                flush=True,
            )
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        end.set()
        signal.signal(signal.SIGTERM, before)
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Its end may take long on a busy machine when all requests are long answered; nobody should wait for that."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


def _keep_refreshing(refresh: Callable[[], object], end: threading.Event) -> None:
    while not end.wait(REFRESH_S):
        with contextlib.suppress(Exception):  # a store that is away is asked again
            refresh()


def _artifacts(file: Path | None) -> str:
    """Where files go that clients send through the server: alongside the SQLite file, as the records' own do."""
    return (file.parent if file else places.private_folder("artifacts")).joinpath("mlartifacts").as_uri()


def free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from None
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], address: str) -> None:
    until = time.monotonic() + START_S
    # The certificate names the server as others call it, and this process has started it.
    context = ssl._create_unverified_context() if address.startswith("https") else None
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"mlflow server ended with status {process.returncode} before it answered")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1.0, context=context).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"mlflow server did not answer at {address} within {START_S:.0f} s")
