"""The part of the ranks' store that belongs to one attempt alone, by a name that all its ranks agree on.

A launcher that starts ranks again may keep its store, in which the signs of life and the accusations of those before still
stand. Its count of restarts does not tell attempts apart: each agent has its own, and one that came back begins at 0. So rank
0 names the attempt, and the others follow its name, also when it changes: what they read first may be the last attempt's.
"""

import os
import secrets
from datetime import timedelta

import torch.distributed as dist

from pipeline.exchange import unix_store


def connect(wait_s: float) -> dist.Store:
    """A connection of its own: on the process group's, the main thread may be waiting. Raises RuntimeError."""
    if folder := os.environ.get(unix_store.FOLDER):
        return unix_store.UnixStore(folder, wait_s=wait_s)
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port:
        raise RuntimeError("MASTER_ADDR and MASTER_PORT are not set")
    return dist.TCPStore(address, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=wait_s))


class AttemptStore:
    """`store`: what belongs to the attempt; None until rank 0 has named one."""

    def __init__(self, whole: dist.Store, name: str, *, rank: int) -> None:
        self._whole, self._name, self._token = whole, name, ""
        self.store: dist.Store | None = None
        self.is_sure = not _outlives_attempts()
        """It is this attempt's and not the last one's; else it is once rank 0 is heard to live."""
        if rank == 0:
            self.is_sure = True
            whole.set(name, secrets.token_hex(8))

    def is_new(self) -> bool:
        """Looks for the name; whether it is another one than before."""
        token = self._whole.get(self._name).decode() if self._whole.check([self._name]) else ""
        if token == self._token:
            return False
        self._token, self.store = token, dist.PrefixStore(f"{self._name}/{token}", self._whole)
        return True


def _outlives_attempts() -> bool:
    """Whether the launcher's store may have served ranks before these."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and restarts != "0"
