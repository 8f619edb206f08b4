"""The key-value store of the ranks of one machine, on a Unix socket in a folder that no other user enters.

torch's own (`TCPStore`) has no password, and the loopback is for all users of a machine: whoever reaches it ends a run, and tells
its ranks to connect elsewhere. This one has the same methods, and its values are in the memory of the process that serves it.
"""

import json
import threading
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch.distributed as dist

FOLDER = "NORMFREE_RANKS_STORE"
"""Variable by which a launcher names the folder; without it ranks meet as `env://` says."""
SOCKET, GROUPS = "store", "groups"
"""In the folder: the socket, and the file in which process groups are made (`dist.FileStore`)."""
MAX_BYTES = 1 << 24
DEFAULT_S = 300.0


class Server:
    """Serves one store in `folder` (mode 0700) from threads of this process, until it ends."""

    def __init__(self, folder: Path) -> None:
        self._store = dist.HashStore()
        self._listener = Listener(str(folder / SOCKET), "AF_UNIX", backlog=128)
        threading.Thread(target=self._accept, name="store", daemon=True).start()

    def close(self) -> None:
        """No more connections; those that are there stay."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="store", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection:
            while True:
                try:
                    words = json.loads(connection.recv_bytes(MAX_BYTES))
                    connection.send_bytes(json.dumps(self._answer(*words)).encode())
                except (EOFError, OSError):  # the rank has left
                    return

    def _answer(self, method: str, wait_s: float, *words: Any) -> Any:
        store = self._store
        try:
            if method in ("wait", "get", "multi_get"):
                keys = [words[0]] if method == "get" else list(words[0])
                store.wait(keys, timedelta(seconds=wait_s))
                found = [store.get(key).decode("latin-1") for key in keys] if method != "wait" else None
                return {"value": found}
            if method == "set":
                store.set(words[0], words[1].encode("latin-1"))
                return {"value": None}
            if method == "compare_set":
                expected, desired = (word.encode("latin-1") for word in words[1:])
                return {"value": store.compare_set(words[0], expected, desired).decode("latin-1")}
            known: dict[str, Any] = {"add": store.add, "check": store.check}
            return {"value": known[method](*words)}
        except RuntimeError as error:  # torch's errors of stores are
            return {"error": str(error)}


class UnixStore(dist.Store):
    """A connection to the `Server` of `folder`; one call at a time. Raises DistNetworkError where there is none any more."""

    def __init__(self, folder: str, *, wait_s: float = DEFAULT_S) -> None:
        super().__init__()
        self._wait_s, self._lock = wait_s, threading.Lock()
        try:
            self._connection = Client(str(Path(folder) / SOCKET), "AF_UNIX")
        except OSError as error:
            raise dist.DistNetworkError(f"the ranks' store in {folder} does not answer ({error})") from None

    def _ask(self, method: str, *words: Any, wait_s: float | None = None) -> Any:
        request = json.dumps([method, self._wait_s if wait_s is None else wait_s, *words]).encode()
        try:
            with self._lock:
                self._connection.send_bytes(request)
                answer = json.loads(self._connection.recv_bytes(MAX_BYTES))
        except (EOFError, OSError):
            raise dist.DistNetworkError("the process that served the ranks' store is gone") from None
        if "error" in answer:
            raise dist.DistStoreError(answer["error"])
        return answer["value"]

    def set(self, key: str, value: str | bytes) -> None:
        self._ask("set", key, _text(value))

    def get(self, key: str) -> bytes:
        return bytes(self._ask("get", key)[0].encode("latin-1"))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [text.encode("latin-1") for text in self._ask("multi_get", keys)]

    def add(self, key: str, value: int) -> int:
        return int(self._ask("add", key, value))

    def check(self, keys: list[str]) -> bool:
        return bool(self._ask("check", keys))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        return bytes(self._ask("compare_set", key, _text(expected_value), _text(desired_value)).encode("latin-1"))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._ask("wait", keys, wait_s=None if timeout is None else timeout.total_seconds())

    def set_timeout(self, timeout: timedelta) -> None:
        self._wait_s = timeout.total_seconds()


def _text(value: str | bytes) -> str:
    return (value if isinstance(value, bytes) else value.encode()).decode("latin-1")
