"""Guard of `normfree ui`: MLflow for the user who started it. Nobody else of the machine or the network is answered.

MLflow's own server has no passwords in this form, and whoever reaches it can have files written and commands run in this user's
name.

connection of this user on this machine    answered: the kernel says whose a local connection is
any other                                  answered with the token: `?token=` once, then a cookie, or `Authorization: Bearer`
"""

import hmac
import http.cookies
import os
import urllib.parse
from typing import Any

from pipeline.exchange import local_connections

COOKIE = "normfree"
REFUSAL = (
    b"This MLflow belongs to another user: open the address that 'normfree ui' has printed, which holds a token.\n"
)


class Guard:
    """The ASGI application `app` for those whom the table above names; 403 for others."""

    def __init__(self, app: Any, token: str, *, tables: tuple[str, ...] = local_connections.TABLES) -> None:
        self._app, self._token, self._tables = app, token, tables

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._is_ours(scope) or self._has_token(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and self._matches(_query(scope).get("token", "")):
            cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
            where = scope["path"] if scope["path"].startswith("/") and not scope["path"].startswith("//") else "/"
            await answer(send, 303, [(b"location", where.encode()), (b"set-cookie", cookie.encode())], b"")
        elif scope["type"] == "http":
            await answer(send, 403, [(b"content-type", b"text/plain")], REFUSAL)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_ours(self, scope: dict[str, Any]) -> bool:
        client, server = scope.get("client"), scope.get("server")
        return (
            client is not None
            and server is not None
            and local_connections.owner(client, server, self._tables) == os.getuid()
        )

    def _has_token(self, scope: dict[str, Any]) -> bool:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        bearer = headers.get(b"authorization", "").removeprefix("Bearer ")
        cookies: http.cookies.SimpleCookie = http.cookies.SimpleCookie()
        try:
            cookies.load(headers.get(b"cookie", ""))
        except http.cookies.CookieError:
            cookies.clear()
        return self._matches(bearer) or (COOKIE in cookies and self._matches(cookies[COOKIE].value))

    def _matches(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _query(scope: dict[str, Any]) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(scope.get("query_string", b"").decode("latin-1")))


async def answer(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})
