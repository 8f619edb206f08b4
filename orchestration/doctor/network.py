"""The network between two hosts: one listens for the length of an examination, the other connects to it and measures."""

import contextlib
import hmac
import socket
import statistics
import threading
import time

from orchestration.doctor.messages import Link

ROUND_TRIPS = 20
SEND_S = 0.5
"""For so long each direction is filled."""
MAX_BYTES = 256 << 20
CONNECT_S = 10.0
QUIET_S = 20.0
CHUNK = 256 << 10
TOKEN_BYTES = 32


class Listener:
    """Answers who knows the token, on a free port of the address ("" = all of them), until it is closed."""

    def __init__(self, address: str, token: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=64)
        self.port: int = self._socket.getsockname()[1]
        self._token = bytes.fromhex(token)
        threading.Thread(target=self._accept, name="doctor listener", daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                line, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line, contextlib.suppress(OSError):
            line.settimeout(QUIET_S)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_exactly(line, TOKEN_BYTES), self._token):
                return
            line.sendall(b"+")
            for _ in range(ROUND_TRIPS):
                line.sendall(_exactly(line, 1))
            _drain(line)
            line.sendall(b"+")
            _fill(line)
            line.shutdown(socket.SHUT_WR)


def measure(address: str, port: int, token: str) -> Link:
    """Round trip and bytes a second in both directions; in `error` why there is no connection."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as line:
            line.settimeout(QUIET_S)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.sendall(bytes.fromhex(token))
            if _exactly(line, 1) != b"+":
                return Link(error="somebody else answers there")
            spent = [_round_trip(line) for _ in range(ROUND_TRIPS)]
            begin_s = time.perf_counter()
            sent = _fill(line)
            line.shutdown(socket.SHUT_WR)
            _exactly(line, 1)
            to_bytes_s = sent / (time.perf_counter() - begin_s)
            begin_s = time.perf_counter()
            from_bytes_s = _drain(line) / (time.perf_counter() - begin_s)
    except OSError as error:
        return Link(error=_words(error))
    return Link(round_trip_s=statistics.median(spent), to_bytes_s=to_bytes_s, from_bytes_s=from_bytes_s)


def _words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_S:.0f} s: a firewall, or no way there"
    return error.strerror or str(error)


def _round_trip(line: socket.socket) -> float:
    begin_s = time.perf_counter()
    line.sendall(b".")
    _exactly(line, 1)
    return time.perf_counter() - begin_s


def _exactly(line: socket.socket, number: int) -> bytes:
    data = b""
    while len(data) < number:
        part = line.recv(number - len(data))
        if not part:
            raise ConnectionResetError(f"closed after {len(data)} of {number} bytes")
        data += part
    return data


def _fill(line: socket.socket) -> int:
    """Sends for a while; the bytes."""
    data, sent, end_s = bytes(CHUNK), 0, time.perf_counter() + SEND_S
    while time.perf_counter() < end_s and sent < MAX_BYTES:
        sent += line.send(data)
    return sent


def _drain(line: socket.socket) -> int:
    """Reads to the end; the bytes."""
    into, number = bytearray(CHUNK), 0
    while found := line.recv_into(into):
        number += found
    return number
