"""A real MLflow server for the tests, on loopback, that can be killed and started again on the same port and records."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_S = 180.0


class MlflowServer:
    def __init__(self, database: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.database = database
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1"]
        environment = os.environ | {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.database}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes more, on two cores
            "PYTHONWARNINGS": "ignore",
        }
        with (self.database.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.database.parent, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5.0).close()
                return
            except OSError:
                assert time.monotonic() < until and self._process.poll() is None, (
                    self.database.parent / "server.log"
                ).read_text()[-2000:]
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def mlflow_server(database: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(database)
    server.start()
    try:
        yield server
    finally:
        server.kill()
