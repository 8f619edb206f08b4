"""Python stacks of this process, and of one next to it that does not run any more.

A stopped process cannot show its stack. It is asked for it by a signal whose handler (`faulthandler`, in C) writes the stacks
of all threads to a file and then lets the signal end the process: sent before the process is continued, it comes before any
other instruction, so what is written is where the process froze, and the process does nothing more.
"""

import contextlib
import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.supervision.phase_clock import PHASES, WHERE

DUMP_SIGNAL = getattr(signal, "SIGRTMIN", 0) + 7
"""One that no library and no scheduler uses, and that ends a process by default."""
DUMP_S = 2.0
MEMORY = "normfree-stacks"
MAIN = "main"
"""Name of the thread that iterates the loop."""


def of_thread(thread: int) -> tuple[str, ...]:
    """Frames of a thread of this process, innermost first, as "file:line in function"."""
    return _lines(sys._current_frames().get(thread))


def of_all_threads(main_thread: int) -> dict[str, tuple[str, ...]]:
    """By the threads' names."""
    names = {t.ident: t.name for t in threading.enumerate()}
    frames = sys._current_frames().items()
    return {
        MAIN if ident == main_thread else f"{names.get(ident, '?')} {ident:#x}": _lines(frame)
        for ident, frame in frames
    }


def _lines(frame: FrameType | None) -> tuple[str, ...]:
    # The names of code objects only: reading sources, as `traceback` does by default, could itself wait for a dead disk.
    return tuple(f"{f.f_code.co_filename}:{line} in {f.f_code.co_name}" for f, line in traceback.walk_stack(frame))


class Dump:
    """While it stands, `DUMP_SIGNAL` makes this process write its stacks and end; `board` is the memory of `Clock.board`.

    Both are one file in memory, board first, which has no name: others read it through this process's descriptor, and nothing is
    left of it when they and the process have ended, however they end.
    """

    def __init__(self) -> None:
        self.path = ""
        """Where others of this user read it while the process is there."""
        self.board: mmap.mmap | None = None
        self._file: Any = None

    def __enter__(self) -> "Dump":
        if hasattr(faulthandler, "register") and hasattr(signal, "SIGRTMIN") and hasattr(os, "memfd_create"):
            number = os.memfd_create(MEMORY)
            os.ftruncate(number, WHERE.size)
            os.lseek(number, WHERE.size, os.SEEK_SET)
            self.board = mmap.mmap(number, WHERE.size)
            self._file = os.fdopen(number, "w")
            self.path = f"/proc/{os.getpid()}/fd/{number}"
            faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True, chain=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            faulthandler.unregister(DUMP_SIGNAL)
            self._file.close()


def examine(pid: int, dump: str) -> dict[str, Any]:
    """What the kernel says of a frozen process on this machine; then its stacks, with which it ends (see above)."""
    found: dict[str, Any] = {"process": "is gone"}
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        found["process"] = status.split("State:", 1)[1].split("\n", 1)[0].strip()
        found["waits_in"] = Path(f"/proc/{pid}/wchan").read_text().strip()
        found["kernel_stack"] = Path(f"/proc/{pid}/stack").read_text().splitlines()  # the superuser's only
    if not dump or found["process"] == "is gone":
        return found
    try:
        # Who says so may be no rank: a process that has no such file is not ended.
        if os.path.dirname(dump) != f"/proc/{pid}/fd" or os.readlink(dump) != f"/memfd:{MEMORY} (deleted)":
            return found
        file = open(dump, "rb")  # noqa: SIM115 - now: the process takes the way to it along
    except OSError:
        return found
    with file:
        number, step = WHERE.unpack(file.read(WHERE.size))
        found |= {"phase": PHASES[number], "last_step": step}
        with contextlib.suppress(OSError):
            os.kill(pid, DUMP_SIGNAL)
            os.kill(pid, signal.SIGCONT)
        deadline_s, text = time.monotonic() + DUMP_S, b""
        while time.monotonic() < deadline_s:
            file.seek(WHERE.size)
            before, text = text, file.read()
            if text and text == before:
                break
            time.sleep(0.05)
    if text:
        found["stacks"] = text.decode(errors="replace").splitlines()
    return found
