"""How a process of ours ends: with its exit code, whatever its threads are at."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from signal import Signals
from typing import NoReturn

from pipeline.supervision.stop_signals import SIGNALS, listen

is_own = False
"""Whether this process is one of ours from its beginning to its end, and no library in somebody else's."""


def run(main: Callable[[], int], stops: Sequence[Signals] = SIGNALS) -> NoReturn:
    """`main` as a process of its own, which hears of stop signals from here on, and ends with what it returns."""
    global is_own
    is_own = True
    listen(stops)
    try:
        code: object = main()
    except SystemExit as error:
        code = error.code
    end(code if isinstance(code, int) else int(code is not None))


def end(code: int) -> NoReturn:
    """End this process with the code, after what is registered with `atexit`; threads are left where they are.

    `sys.exit` takes the interpreter apart while threads still run, and one of them that is inside torch (gloo's, or a
    reader whose data stalled) then aborts the process: "terminate called without an active exception", SIGABRT, for a run
    that ended well.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # whoever read us may be gone; a stream that was closed before the start (`>&-`) is None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
