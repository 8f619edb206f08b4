"""One process of a fine-tuning trial that runs as several (`orchestration.tune.trial_group` starts and hears it)."""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
from typing import Any

from pipeline.errors import UserError
from pipeline.supervision.process_exit import end


def main() -> int:
    line = socket.socket(fileno=int(sys.argv[1]))
    reader = line.makefile("rb")
    job = json.loads(reader.readline())
    answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_hear, args=(reader, answers), name="worker", daemon=True).start()

    def say(**words: Any) -> None:
        line.sendall(json.dumps(words).encode() + b"\n")

    def report(row: dict[str, Any]) -> None:
        say(row=row)
        answers.get()  # the driver may want the trial ended here

    try:
        _run(job, report)
    except BaseException as error:
        from transfer.sweep.failures import cause_of, reason

        users = isinstance(error, UserError)
        text = reason(error) if isinstance(error, Exception) else type(error).__name__
        say(error=text, users=users, cause=cause_of(error))
        return 1
    say(done=True)
    return 0


def _run(job: dict[str, Any], report: Any) -> None:
    import torch

    from pipeline.distributed import leave
    from transfer.sweep.cells import sweep_of
    from transfer.sweep.entry import Trial
    from transfer.sweep.trials import run_finetune

    torch.set_num_threads(1)  # a process is one core
    run_finetune(sweep_of(job["out"]), Trial(**job["trial"]), report, until=int(job["until"]))
    leave()


def _hear(reader: Any, answers: queue.SimpleQueue[bytes]) -> None:
    """Until the worker is gone: then nobody wants this process."""
    with contextlib.suppress(OSError):
        for answer in reader:
            answers.put(answer)
    os._exit(1)


if __name__ == "__main__":
    end(main())
