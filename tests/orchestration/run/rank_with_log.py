"""A rank that writes to its log as ranks do: python rank_with_log.py OUT WHAT [WORDS]."""

import os
import signal
import sys

from orchestration.run import rank_log
from pipeline.supervision.process_exit import run
from pipeline.supervision.rank_environment import place
from pipeline.supervision.stop_signals import say


def main() -> int:
    out, what, *words = sys.argv[1:]
    with rank_log.kept(out) as log:
        print("a word from Python, before the run's folder is its own")
        if what == "refused":
            log.forget()
            say("it cannot be")
            return 2
        log.begin()
        os.write(2, b"a word from elsewhere\n")
        for word in words:
            print(word, flush=True)
        if what == "killed":
            os.write(1, b"the last word")
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "failed":
            log.note(ValueError("the cause"))
            say(f"rank {place().rank} failed: ValueError: the cause (process {os.getpid()})")
            return 1
    print("after the log")
    return 0


run(main)
