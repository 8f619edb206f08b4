"""A store that is not there is known soon; one that asks for patience gets it. Counted in waits asked for, not in time."""

import asyncio
import random
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from orchestration.cli import main
from pipeline.storage import clients, objects, store_errors


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that we and the client under us ask to wait, without waiting; every draw is the longest."""
    found: list[float] = []
    real = asyncio.sleep

    async def asked(delay: float, *_: Any) -> None:
        found.append(delay)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", asked)
    monkeypatch.setattr(random, "random", lambda: 1.0)
    monkeypatch.setattr(clients.time, "sleep", found.append)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return found


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Points clients at a port of this machine; those made for another one are forgotten."""
    import s3fs

    def point(port: int) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        s3fs.S3FileSystem.clear_instance_cache()

    yield point
    s3fs.S3FileSystem.clear_instance_cache()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


OPERATIONS = {
    "read": lambda: objects.read_bytes("s3://bucket/x"),
    "write": lambda: objects.write_bytes("s3://bucket/x", b"1"),
    "list": lambda: objects.list_urls("s3://bucket/x"),
    "exists": lambda: objects.exists("s3://bucket/x"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_store_that_refuses_connections_is_known_within_ten_seconds_of_waiting(
    operation: str, waits: list[float], endpoint: Any
) -> None:
    endpoint(closed_port())
    with pytest.raises(Exception, match="Could not connect") as raised:
        OPERATIONS[operation]()
    assert store_errors.is_transient(raised.value) and not store_errors.is_throttled(raised.value)
    assert len(waits) >= clients.MAX_TRIES and 3 <= sum(waits) <= 10, waits


def test_a_command_says_that_the_store_does_not_answer_and_takes_no_blame(
    waits: list[float], endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint(closed_port())
    assert main(["data", "verify", "s3://bucket/data"]) == 2
    said = capsys.readouterr().err
    assert "the object store does not answer (EndpointConnectionError" in said and "fault of ours" not in said
    assert store_errors.silence(OSError("no space left on device")) is None


class Busy(BaseHTTPRequestHandler):
    """Answers 503 to the first `num_busy` requests, and then holds an object of one byte."""

    num_busy = num_asked = 0
    code = "SlowDown"

    def do_GET(self) -> None:
        Busy.num_asked += 1
        busy = Busy.num_asked <= Busy.num_busy
        body = f"<Error><Code>{Busy.code}</Code><Message>later</Message></Error>".encode() if busy else b"1"
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def busy(endpoint: Any) -> Iterator[type[Busy]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(server.server_address[1])
    Busy.num_asked = 0
    yield Busy
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("code", ["SlowDown", "ServiceUnavailable"])
def test_a_store_that_asks_for_patience_gets_more_of_it_than_one_that_is_not_there(
    code: str, waits: list[float], busy: type[Busy]
) -> None:
    busy.code, busy.num_busy = code, clients.S3_ATTEMPTS * (clients.MAX_TRIES_PATIENT - 1)
    assert objects.read_bytes("s3://bucket/x") == b"1"
    assert busy.num_asked > busy.num_busy


def test_a_store_that_stays_busy_is_given_up(waits: list[float], busy: type[Busy]) -> None:
    busy.code, busy.num_busy = "ServiceUnavailable", 10**6
    with pytest.raises(OSError) as raised:
        objects.read_bytes("s3://bucket/x")
    assert store_errors.is_throttled(raised.value) and sum(waits) >= 25
    assert busy.num_asked == clients.S3_ATTEMPTS * clients.MAX_TRIES_PATIENT
