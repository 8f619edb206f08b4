"""One fine-tuning trial as several processes: started here, spoken to over a socket each, and ended together.

    worker of the sweep                 ranks: `orchestration.tune.trial_rank`
      the job                      ->   all of them: the same loop, the same global batch, the same order
      row (under ASHA)             <-   rank 0, which waits
      go on                        ->
      done                         <-   each; of rank 0: entry, predictions or rung are written
      what went wrong              <-   any rank

A rank whose worker is gone ends: its socket closes, and Linux kills it, stopped or not. A rank that fails ends the trial, with
the cause that was there first; one that was killed says nothing and is named for it.
"""

import dataclasses
import json
import selectors
import socket
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

from orchestration import child_process
from pipeline import documents
from pipeline.storage import objects
from pipeline.supervision.watchdog import EXIT_HANG
from transfer.search.successive_halving import work_url
from transfer.sweep.cells import Sweep
from transfer.sweep.entry import Trial
from transfer.sweep.failures import Cause, TrialFailed
from transfer.sweep.trials import Report

LINGER_S = 5.0
"""After the first failure the others may say something too, for what one says may follow from what another did;"""
LEAVE_S = 30.0
"""and after rank 0 is done the others leave by themselves; then all are killed."""


@dataclass
class _Rank:
    """One process, and what has come of it."""

    number: int
    process: subprocess.Popen[bytes]
    line: socket.socket
    unread: bytes = b""
    is_open: bool = True
    is_done: bool = False
    error: str = ""
    users: bool = False
    """Its error is the user's to mend, and every rank meets the same."""
    cause: Cause = "error"


@dataclass
class _Group:
    ranks: list[_Rank]
    failed: list[_Rank] = field(default_factory=list)
    """In the order in which that was heard."""

    @property
    def is_done(self) -> bool:
        """What the trial writes is written: the main rank's business."""
        return self.ranks[0].is_done


def run_ranks(sweep: Sweep, trial: Trial, report: Report, *, until: int, num_processes: int, has_gpus: bool) -> None:
    """`transfer.sweep.trials.run_finetune`, on `num_processes` processes of this machine.

    Args:
        has_gpus: a GPU for each of them is visible to this process; else they see none.
    Raises:
        TrialFailed: a rank failed, with its cause. Whatever `report` raises ends them too.
    """
    job = {"out": sweep.out, "trial": dataclasses.asdict(trial), "until": until}
    group = _Group([])
    with child_process.rank_variables(num_processes) as variables:
        shared = {**variables, "OMP_NUM_THREADS": "1"} | ({} if has_gpus else {"CUDA_VISIBLE_DEVICES": ""})
        try:
            for number in range(num_processes):
                group.ranks.append(_start(number, shared, job))
            _listen(group, report)
            if not group.is_done:
                raise _failure(group, work_url(sweep.out, trial.digest))
            _await_end(group)
        finally:
            for rank in group.ranks:
                rank.process.kill()
                rank.process.wait()
                rank.line.close()


def _start(number: int, shared: dict[str, str], job: dict[str, Any]) -> _Rank:
    ours, theirs = socket.socketpair()
    with theirs:
        process = child_process.start(
            "orchestration.tune.trial_rank",
            [str(theirs.fileno())],
            environment={**shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            pass_fds=[theirs.fileno()],
        )
    ours.sendall(json.dumps(job).encode() + b"\n")
    return _Rank(number, process, ours)


def _listen(group: _Group, report: Report) -> None:
    """Until rank 0 is done, or some seconds after a rank has failed."""
    deadline_s: float | None = None
    with selectors.DefaultSelector() as selector:
        for rank in group.ranks:
            selector.register(rank.line, selectors.EVENT_READ, rank)
        while not group.is_done and any(rank.is_open for rank in group.ranks):
            if group.failed and deadline_s is None:
                deadline_s = time.monotonic() + LINGER_S
            if deadline_s is not None and time.monotonic() > deadline_s:
                return
            for key, _ in selector.select(timeout=0.5):
                heard: _Rank = key.data
                for message in _read(heard):
                    _take(group, heard, message, report)
                if not heard.is_open:
                    selector.unregister(heard.line)
                    if not heard.error and not heard.is_done:
                        group.failed.append(heard)


def _read(rank: _Rank) -> list[dict[str, Any]]:
    """Whole lines that have come; the socket may have closed after them."""
    try:
        data = rank.line.recv(1 << 16)
    except ConnectionError:  # it was killed with something of ours unread
        data = b""
    rank.is_open = bool(data)
    *whole, rank.unread = (rank.unread + data).split(b"\n")
    return [json.loads(line) for line in whole]


def _take(group: _Group, rank: _Rank, message: dict[str, Any], report: Report) -> None:
    if "row" in message:
        report(message["row"])
        rank.line.sendall(b"go on\n")
    elif "error" in message:
        rank.error, rank.users, rank.cause = message["error"], message["users"], message["cause"]
        group.failed.append(rank)
    elif message.get("done"):
        rank.is_done = True


def _failure(group: _Group, work: str) -> TrialFailed:
    """What ended the trial: a user's mistake, a rank that froze or was killed, or the first error that was reported."""
    size = len(group.ranks)
    users = [rank for rank in group.failed if rank.users]
    if users:
        return TrialFailed(users[0].error, users[0].cause)
    for rank in group.failed:
        code = None if rank.error else _code(rank)
        if code == EXIT_HANG:
            frozen = f"rank {rank.number} of {size} processes found that one was frozen"
            return TrialFailed(_hang(work) or frozen, "lost")
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code} and no word"
            return TrialFailed(f"rank {rank.number} of {size} processes {how} (killed, or out of memory)", "lost")
    first = group.failed[0]
    return TrialFailed(f"rank {first.number} of {size} processes: {first.error}", first.cause)


def _code(rank: _Rank) -> int | None:
    """Its exit code; None while it runs."""
    try:
        return rank.process.wait(timeout=LINGER_S)
    except subprocess.TimeoutExpired:
        return None


def _hang(work: str) -> str:
    """What the newest report of a frozen rank says (`pipeline.supervision.hang_report`)."""
    from pipeline.supervision.hang_report import sentence

    reports = [url for url in objects.list_urls(work, ".json") if url.rpartition("/")[2].startswith("hang-")]
    return sentence(documents.read_json(reports[-1]), reports[-1]) if reports else ""


def _await_end(group: _Group) -> None:
    deadline_s = time.monotonic() + LEAVE_S
    for rank in group.ranks:
        try:
            rank.process.wait(timeout=max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return
