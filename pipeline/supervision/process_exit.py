"""How a process of ours ends: with its exit code, whatever its threads are at."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def end(code: int) -> NoReturn:
    """End this process with the code, after what is registered with `atexit`; threads are left where they are.

    `sys.exit` takes the interpreter apart while threads still run, and one of them that is inside torch (gloo's, or a
    reader whose data stalled) then aborts the process: "terminate called without an active exception", SIGABRT, for a run
    that ended well.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read us may be gone
            stream.flush()
    os._exit(code)
