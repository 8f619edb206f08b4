"""What the agents of a job tell each other, in the store through which they meet.

ended         the job's exit code, once it is over: agents that come later end with it
failures      those within the window, and when
left out      hosts that take no further part
of an attempt: the name of each host, how its ranks ended, and the one verdict, written by whoever reaches one first
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from orchestration.launch.restart_policy import LONGEST_PAUSE_S, Failure, HostReport, Verdict
from pipeline.documents import Text
from pipeline.exchange import objects

WAIT_S = 30.0
"""For any single answer of the store."""
POLL_S = 0.2
STORE = "the job's store"


def connect(address: str, port: int, *, wait_s: float) -> Store:
    """A connection of its own. Raises RuntimeError where nothing answers within `wait_s`."""
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=wait_s))
    store.set_timeout(timedelta(seconds=WAIT_S))
    return store


class JobRecord:
    """Of the whole job."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def ended(self) -> int | None:
        return objects.document(self._store.get("ended"), int, STORE) if self._store.check(["ended"]) else None

    def end(self, code: int) -> int:
        """The job is over; the code that it was over with first."""
        return objects.document(self._store.compare_set("ended", "", str(code)), int, STORE)

    def is_left_out(self, host: str) -> bool:
        return self._store.check([f"left out/{host}"])

    def leave_out(self, host: str) -> None:
        self._store.set(f"left out/{host}", "")

    @property
    def failures(self) -> list[Failure]:
        if not self._store.check(["failures"]):
            return []
        return objects.document(self._store.get("failures"), list[Failure], STORE)

    @failures.setter
    def failures(self, failures: Sequence[Failure]) -> None:
        self._store.set("failures", json.dumps([dataclasses.asdict(f) for f in failures]))


class AttemptRecord:
    """Of one attempt; `store` holds nothing of any other."""

    def __init__(self, store: Store, *, group_rank: int, num_hosts: int) -> None:
        self._store, self._rank, self._size = PrefixStore("normfree", store), group_rank, num_hosts

    def join(self, host: str) -> None:
        self._store.set(f"host/{self._rank}", json.dumps(host))

    def hosts(self) -> list[str]:
        """By their ranks among the hosts; each has joined before it starts its processes."""
        return [objects.document(self._store.get(f"host/{rank}"), Text, STORE) for rank in range(self._size)]

    def report(self, report: HostReport) -> None:
        self._store.set(f"report/{self._rank}", json.dumps(dataclasses.asdict(report)))

    def reports(self, wait_s: float, is_enough: Callable[[], bool]) -> list[HostReport]:
        """Those of all hosts, or the ones that have come when there is a verdict, `is_enough`, or `wait_s` have passed."""
        deadline_s = time.monotonic() + wait_s
        while True:
            there = [key for rank in range(self._size) if self._store.check([key := f"report/{rank}"])]
            if (
                len(there) == self._size
                or self._store.check(["verdict"])
                or is_enough()
                or time.monotonic() > deadline_s
            ):
                return [objects.document(self._store.get(key), HostReport, STORE) for key in there]
            time.sleep(POLL_S)

    def agree(self, verdict: Verdict) -> tuple[Verdict, bool]:
        """The verdict of the host that was first, and whether that is this one."""
        mine = _Agreed(verdict=verdict, by=self._rank)
        found = objects.document(
            self._store.compare_set("verdict", "", json.dumps(dataclasses.asdict(mine))), _Agreed, STORE
        )
        pause_s = max(0.0, min(found.verdict.pause_s, LONGEST_PAUSE_S))
        return dataclasses.replace(found.verdict, pause_s=pause_s), found.by == self._rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Agreed:
    verdict: Verdict
    by: int
