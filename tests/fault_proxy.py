"""A proxy on loopback between a client and an object store that breaks answers as it is told; one request a connection."""

import contextlib
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path?query" matches."""

    match: str
    times: int = 1
    status: int = 0
    """Answer this instead of asking the store."""
    after_bytes: int | None = None
    """End the connection after so many bytes of the body ..."""
    reset: bool = True
    """... with a reset, else cleanly."""
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    edit: Callable[[bytes], bytes] | None = None
    """Make another body of the store's."""


@dataclass
class FaultProxy:
    url: str
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    """("METHOD /path?query", Range header) of each request."""

    def pick(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.match, line):
                fault.times -= 1
                return fault
        return None


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A running proxy in front of `upstream` (http://host:port)."""
    host, port = upstream.removeprefix("http://").split(":")
    proxy = FaultProxy("")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                _serve(self.request, proxy, (host, int(port)))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield proxy
        server.shutdown()


def _serve(client: Any, proxy: FaultProxy, upstream: tuple[str, int]) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        piece = client.recv(65536)
        if not piece:
            return
        head += piece
    line = head.split(b"\r\n", 1)[0].decode().rsplit(" ", 1)[0]
    wanted = re.search(rb"(?i)\r\nrange: ([^\r]*)", head)
    proxy.log.append((line, wanted[1].decode() if wanted else ""))
    fault = proxy.pick(line) or Fault("")
    time.sleep(fault.delay_s)
    if fault.status:
        body = b"<Error><Code>SlowDown</Code><Message>injected</Message></Error>"
        client.sendall(b"HTTP/1.1 %d Injected\r\nContent-Length: %d\r\n" % (fault.status, len(body)))
        client.sendall(b"Content-Type: application/xml\r\nConnection: close\r\n\r\n" + body)
        return
    head, _, early = head.partition(b"\r\n\r\n")
    if b"100-continue" in head.lower():  # answered here: what follows from the store is the answer proper
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    head = re.sub(rb"(?i)\r\n(connection|expect):[^\r]*", b"", head) + b"\r\nConnection: close\r\n\r\n"
    with socket.create_connection(upstream) as store:
        store.sendall(head + early)
        threading.Thread(target=_send_on, args=(client, store), daemon=True).start()
        with store.makefile("rb") as answer:
            lines = []
            while (text := answer.readline()) not in (b"\r\n", b""):
                lines.append(text)
            _answer(client, b"".join(lines), answer, fault)


def _send_on(client: Any, store: Any) -> None:
    """The rest of a request's body."""
    with contextlib.suppress(OSError):
        while piece := client.recv(65536):
            store.sendall(piece)


def _answer(client: Any, head: bytes, body: Any, fault: Fault) -> None:
    if fault.edit is not None:
        content = fault.edit(_whole(head, body))
        head = re.sub(rb"(?im)^(content-length|transfer-encoding):[^\n]*\n", b"", head)
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        return
    client.sendall(head + b"\r\n")
    sent = 0
    while piece := body.read1(16384):
        if fault.after_bytes is not None and sent + len(piece) >= fault.after_bytes:
            client.sendall(piece[: fault.after_bytes - sent])
            time.sleep(0.05)
            if fault.reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.shutdown(socket.SHUT_RD if fault.reset else socket.SHUT_RDWR)  # wakes the thread that listens on it
            client.close()
            return
        client.sendall(piece)
        sent += len(piece)
        if fault.bytes_per_s:
            time.sleep(len(piece) / fault.bytes_per_s)


def _whole(head: bytes, body: Any) -> bytes:
    if b"chunked" not in head.lower():
        return bytes(body.read())
    content = b""
    while size := int(body.readline().split(b";")[0], 16):
        content += body.read(size)
        body.readline()
    return content
