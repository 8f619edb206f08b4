"""The ranks of one host of a job, from the first attempt to the job's exit code, on one host and on many.

    a thread            attempts (`attempts`): torch's agent, then the verdict over all hosts, and again
    the main thread     signals, and all that must not wait for what the thread waits for: stores, ranks that do not end

A job is stopped by one signal to any agent, or any rank; ranks save within their grace period, which they keep themselves. A
second signal means now. Ranks end with their agent, however that ends (`orchestration.child_process`).
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousStateError

from orchestration.launch.attempts import REPORT_S, Attempts, Hosts
from orchestration.launch.rank_processes import RankProcesses, Ranks
from orchestration.run.rank_end import EXIT_OURS, EXIT_USER
from pipeline import places
from pipeline.errors import UserError
from pipeline.supervision.stop_signals import EXIT_REQUEUE, heeded, say

POLL_S = 0.1
MARGIN_S = 1.0
"""After the grace period of a stop signal, which the ranks keep by themselves."""
LEAVE_S = 5.0
"""A stop where no ranks are: the other hosts are told within this time, or find out."""


def supervise(ranks: Ranks, hosts: Hosts) -> int:
    """The job's exit code. Called on the main thread.

    SIGTERM, SIGINT and SIGHUP are passed on to all ranks of this host as SIGTERM, each once.
    """
    asked: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    before: dict[int, Any] = {n: signal.signal(n, ask) for n in heeded()}
    try:
        with places.temporary_folder("ranks") as ends:
            processes = RankProcesses(ends)
            try:
                return _watch(Attempts(ranks, hosts, processes, ends), processes, asked, ranks.grace_s)
            finally:
                processes.stop()
                processes.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(attempts: Attempts, processes: RankProcesses, asked: list[int], grace_s: float) -> int:
    codes: list[int] = []

    def work() -> None:
        try:
            codes.append(attempts.run())
        except (UserError, RendezvousStateError) as error:  # the store holds what no agent of this job writes
            say(" ".join(str(error).split()))
            codes.append(EXIT_USER)
        except Exception as error:  # torch's, of anything it does
            say(f"the agent failed: {type(error).__name__}: {error}")
            codes.append(EXIT_OURS)

    thread = threading.Thread(target=work, name="agent", daemon=True)
    thread.start()
    asked_s: float | None = None
    while thread.is_alive():
        thread.join(POLL_S)
        processes.kill_frozen()
        if attempts.is_over.is_set() and not asked:
            asked.append(0)
        if not asked:
            continue
        now_s = time.monotonic()
        asked_s = asked_s or now_s
        processes.stop()
        processes.ask(len(asked))
        waited_s = now_s - asked_s
        if waited_s > grace_s + MARGIN_S and not attempts.are_late:  # frozen, they do not hear
            attempts.are_late = True
            processes.kill()
        if (attempts.is_waiting and waited_s > LEAVE_S) or waited_s > grace_s + MARGIN_S + REPORT_S + LEAVE_S:
            break
    return codes[0] if codes else EXIT_REQUEUE
