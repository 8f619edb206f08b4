"""The personal server answers its user's own connections and the token, and nobody else."""

import asyncio
import os
import socket
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from orchestration.serve import server
from orchestration.serve.own_guard import COOKIE, Guard
from orchestration.tracking.tracking_uri import sqlite_uri
from pipeline.exchange.local_connections import owner

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
ELSEWHERE = ("203.0.113.5", 40000)


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def ask(client: tuple[str, int], target: str = "/", **headers: str) -> tuple[int, dict[bytes, bytes]]:
    path, _, query = target.partition("?")
    scope = {"type": "http", "path": path, "query_string": query.encode(), "client": client, "server": ("127.0.0.1", 1)}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Guard(_app, "the token")(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_kernel_says_whose_a_local_connection_is(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("no IPv6 here")
    with server, socket.create_connection(server.getsockname()[:2]) as client:
        ends = client.getsockname()[:2], client.getpeername()[:2]
        assert owner(*ends, TABLES) == os.getuid()
        assert owner(*reversed(ends), TABLES) is None or server.accept()
    assert owner(*ends, TABLES) is None, "a connection that its process has closed is listed as the superuser's"


def test_another_users_connection_is_not_answered(tmp_path: Path) -> None:
    rows = "header\n 0: 0100007F:9C40 0100007F:1388 01 0:0 00:0 0 {uid} 0 {inode} 1\n"
    for uid, inode, expected in ((12345, 77, 12345), (0, 0, None)):
        (tmp_path / "tcp").write_text(rows.format(uid=uid, inode=inode))
        assert owner(("127.0.0.1", 40000), ("127.0.0.1", 5000), (str(tmp_path / "tcp"),)) == expected
    assert ask(("127.0.0.1", 40000))[0] == 403


def test_from_elsewhere_the_token_opens_once_and_the_cookie_afterwards() -> None:
    assert [ask(ELSEWHERE, target)[0] for target in ("/", "/?token=", "/?token=wrong", "/health")] == [403] * 4
    status, headers = ask(ELSEWHERE, "/?" + urllib.parse.urlencode({"token": "the token"}))
    assert status == 303 and headers[b"location"] == b"/" and b"HttpOnly; SameSite=Strict" in headers[b"set-cookie"]
    assert ask(ELSEWHERE, cookie=f'{COOKIE}="the token"')[0] == 200
    assert ask(ELSEWHERE, authorization="Bearer the token")[0] == 200
    assert ask(ELSEWHERE, cookie=f"{COOKIE}=wrong", authorization="Basic eDp5")[0] == 403


def test_an_address_with_the_token_leads_nowhere_else() -> None:
    status, headers = ask(ELSEWHERE, "//evil.example?token=the+token")
    assert status == 303 and headers[b"location"] == b"/"


def test_a_file_that_was_cut_short_is_made_anew_before_mlflow_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(server, "make_sqlite", done.append)
    monkeypatch.setattr(server, "run_server", lambda *_, uri, **__: done.append(f"served {uri}") or 0)
    (tmp_path / "mlflow.db").touch()
    uri = sqlite_uri(tmp_path / "mlflow.db")
    assert server.serve(uri, port=0) == 0 and done == [uri, f"served {uri}"]
