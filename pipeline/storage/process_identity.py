"""Which process it is, on which machine, and whether it lives: by its number and the time of its start."""

import contextlib
import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    machine: str
    """Of a boot and a process namespace: only there do process numbers mean something."""
    host: str
    pid: int
    started: str
    launcher: int = 0
    """Process that started it and ends with it; 0 where there is none."""
    launcher_started: str = ""

    @property
    def is_here(self) -> bool:
        return self.machine == machine()

    @property
    def is_alive(self) -> bool:
        """For one of this machine."""
        return started_at(self.pid) == self.started

    @property
    def has_launcher(self) -> bool:
        return not self.launcher or started_at(self.launcher) == self.launcher_started


def this_process(*, launched: bool = False) -> Process:
    """This process, to be named in a record; `launched`: it ends with the process that started it."""
    launcher = os.getppid() if launched else 0
    return Process(
        machine(),
        socket.gethostname(),
        os.getpid(),
        started_at(os.getpid()) or "",
        launcher,
        (started_at(launcher) or "gone") if launched else "",
    )


@functools.cache
def machine() -> str:
    """Equal for processes that see each other under their numbers: host, its last start, name space of processes.

    The name too: clones of a running virtual machine share their boot's number.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started_at(pid: int | None) -> str | None:
    """When a living process started, None for one that is gone: a process number alone may have gone to another."""
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    try:  # no /proc here: the number must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
