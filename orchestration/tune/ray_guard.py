"""Waits for the end of a sweep's driver, then kills what is left of its Ray: the processes with its mark in their environment.

A pipe from `orchestration.tune.local_ray` gives the mark, and later either "ended", or nothing, which is the driver's death; then
Ray's folder is removed too.
"""

import contextlib
import os
import shutil
import signal
import sys

from orchestration.child_process import processes_with

MARK = "NORMFREE_RAY"


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a driver may take long to end after these
        signal.signal(number, signal.SIG_IGN)
    descriptor, folder = sys.argv[1:]
    with os.fdopen(int(descriptor)) as pipe:
        mark = pipe.readline().strip()
        has_ended = pipe.readline().strip() == "ended"
    for _ in range(10):  # a process may be starting another one just now
        left = processes_with(mark) if mark else []
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            break
    if not has_ended:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
