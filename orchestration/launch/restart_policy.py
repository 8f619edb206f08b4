"""What follows from how the ranks of an attempt ended: pure functions.

An attempt is one set of ranks, from a rendezvous of the hosts to their end. Its verdict is the same on all hosts: the first
agent that reaches one writes it into the store, and the others follow it.

    2                     the user's mistake, which every attempt would meet: the job ends, on all hosts
    75, asked for         a signal to an agent or a rank: the job ends, on all hosts
    0                     finished
    76, 1, a signal       the ranks start again from the newest checkpoint, on the hosts that are left, after a pause that grows,
                          until there were more such failures in a window of time than are allowed
    75, not asked for     a host joined or was lost, and the ranks saved for it: they start again, which counts in the second case
"""

import dataclasses
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestration.run.rank_end import EXIT_OURS, EXIT_USER
from pipeline.supervision.stop_signals import EXIT_REQUEUE, SIGNALS
from pipeline.supervision.watchdog import EXIT_HANG

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True, kw_only=True)
class RestartLimits:
    """How often a job starts again after failures."""

    max_restarts: int
    """Failures within the window that are followed by a restart."""
    window_s: float
    min_hosts: int


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """How the ranks of one host ended."""

    host: str
    codes: tuple[int, ...]
    """Of each rank; negative: by this signal."""
    is_stopped: bool
    """This host's agent or one of its ranks was asked to stop by a signal from outside."""
    has_main: bool
    """Rank 0 was one of them."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    time_s: float
    """Unix time."""
    hosts: tuple[str, ...]
    """To blame; none where nothing points at one."""
    code: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On an attempt, for all hosts."""

    goes_on: bool
    code: int
    """Of the job if it ends here, else of the attempt."""
    why: str = ""
    blamed: tuple[str, ...] = ()
    is_failure: bool = False
    """It counts against the limit."""
    pause_s: float = 0.0
    left_out: str = ""
    """A host that takes no further part."""

    def sentence(self, num_failures: int, limits: RestartLimits) -> str:
        """For people, where it says more than the ranks have said themselves."""
        allowed = f"{limits.max_restarts} within {limits.window_s / 60:.0f} min"
        if self.left_out:
            return f"{self.left_out} has failed {limits.max_restarts + 1} times and is left out; the other hosts go on"
        if self.goes_on and self.is_failure:
            again = f"starting again from the newest checkpoint in {self.pause_s:.0f} s"
            return f"{self.why}; {again} (restart {num_failures} of {allowed})"
        if self.is_failure and limits.max_restarts:
            return f"{self.why}, and no restart is left ({allowed})"
        return ""


def outcome(codes: Sequence[int]) -> int:
    """One exit code for those of several ranks: that of the rank that explains the others.

    A rank that a stop signal ended before it could listen had nothing to save: that counts as stopped.
    """
    found = {EXIT_REQUEUE if -code in SIGNALS else code for code in codes} - {0}
    for first in (EXIT_USER, EXIT_HANG):  # the others fail, or freeze, because this one has left
        if first in found:
            return first
    wrong = found - {EXIT_REQUEUE}
    if wrong:
        return max(max(wrong), EXIT_OURS)
    return EXIT_REQUEUE if found else 0


def judge(reports: Sequence[HostReport], hosts: Sequence[str], *, is_growing: bool) -> Verdict:
    """The verdict on an attempt, but for limits and pauses (`limited`).

    Args:
        reports: of the hosts whose ranks have ended by themselves.
        hosts: all that took part.
        is_growing: a host waits to join, for which ranks save and leave.
    """
    missing = tuple(host for host in hosts if host not in {r.host for r in reports})
    code = outcome([c for r in reports for c in r.codes])
    is_stopped = any(r.is_stopped for r in reports)
    if code in (EXIT_USER, 0) and (code or not missing or any(r.has_main for r in reports)):
        return Verdict(goes_on=False, code=code)  # of several, rank 0 writes last: where it is done, all is
    if is_stopped:
        return Verdict(goes_on=False, code=code or EXIT_REQUEUE)
    if code in (0, EXIT_REQUEUE):
        if is_growing:
            return Verdict(goes_on=True, code=EXIT_REQUEUE, why="the hosts of the run change")
        if missing:
            why = f"{_names(missing)} is not heard of any more"
            return Verdict(goes_on=True, code=EXIT_OURS, why=why, blamed=missing, is_failure=True)
        return Verdict(goes_on=False, code=EXIT_REQUEUE)
    killed = tuple(r.host for r in reports if any(_is_own_end(c) for c in r.codes))
    blamed = killed or missing or (tuple(r.host for r in reports) if len(reports) == 1 else ())
    why = f"a rank on {_names(killed)} was ended by a signal" if killed else f"ranks ended with code {code}"
    if missing and not killed:
        why = f"{_names(missing)} is not heard of any more"
    if code == EXIT_HANG:
        why = "a rank froze" + (f" on {_names(blamed)}" if blamed else "")
    return Verdict(goes_on=True, code=code, why=why, blamed=blamed, is_failure=True)


def _is_own_end(code: int) -> bool:
    return code < 0 and -code not in SIGNALS


def _names(hosts: Sequence[str]) -> str:
    return " and ".join(hosts)


def limited(
    verdict: Verdict, earlier: Sequence[Failure], *, now_s: float, hosts: Sequence[str], limits: RestartLimits
) -> tuple[Verdict, list[Failure]]:
    """The verdict with its pause, or its end, and the failures to remember.

    Where the limit is passed and one host alone was to blame each time, that host is left out, if enough others are there, and
    the count begins anew.
    """
    kept = [f for f in earlier if now_s - f.time_s < limits.window_s]
    if not verdict.is_failure:
        return verdict, kept
    kept.append(Failure(time_s=now_s, hosts=verdict.blamed, code=verdict.code))
    if len(kept) <= limits.max_restarts:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (len(kept) - 1))
        return dataclasses.replace(verdict, pause_s=pause_s), kept
    worst, times = (
        Counter(host for f in kept for host in f.hosts).most_common(1)[0] if any(f.hosts for f in kept) else ("", 0)
    )
    others = [host for host in hosts if host != worst]
    if limits.max_restarts and times == len(kept) and len(others) >= limits.min_hosts and others:
        return dataclasses.replace(verdict, pause_s=FIRST_PAUSE_S, left_out=worst), []
    return dataclasses.replace(verdict, goes_on=False), kept


def death(rank: int, pid: int, code: int) -> str:
    """A sentence about a rank that a signal ended, which could not say anything itself; empty for others."""
    if not _is_own_end(code) or -code >= signal.SIGRTMIN:
        return ""
    memory = ", most likely for its memory" if code == -signal.SIGKILL else ""
    return f"rank {rank} (process {pid}) was ended by {signal.Signals(-code).name}{memory}"
