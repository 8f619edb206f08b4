"""Attempt after attempt on this host, until the job is over: torch's agent, the verdict over all hosts, and again."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError, HashStore, PrefixStore, Store
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from orchestration import child_process
from orchestration.launch import elastic, job_store
from orchestration.launch.job_store import AttemptRecord, JobRecord
from orchestration.launch.rank_processes import RankProcesses, Ranks, Stopped
from orchestration.launch.restart_policy import HostReport, RestartLimits, Verdict, death, judge, limited, outcome
from orchestration.run import rank_end
from orchestration.run.rank_end import EXIT_CUT_OFF, EXIT_OURS
from pipeline.errors import UserError
from pipeline.storage.ownership import JOB
from pipeline.supervision.stop_signals import EXIT_REQUEUE, say

REPORT_S = 15.0
"""So long an agent waits for how the ranks of other hosts ended,"""
FINISH_S = 120.0
"""so long if its own have finished, since rank 0 then still hands on the last records, and"""
STORE_S = 60.0
"""for a store that is gone to come back at the same place."""
CONNECT_S = 10.0
LISTEN_S = 1.0
StoreGone = (RendezvousConnectionError, DistError)


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Where, and with whom."""

    run_id: str
    """Of this launch: equal on all hosts, and no other launch's."""
    host: str
    """This one, as people know it; no other host's."""
    address: str
    """By which others reach this host."""
    store: tuple[str, int]
    """Where the agents meet; port 0: this one is alone, and the store is in its memory."""
    min_hosts: int = 1
    max_hosts: int = 1
    join_s: float = 600.0
    """So long an agent waits until enough hosts are there."""
    limits: RestartLimits


class Attempts:
    """`run` gives the job's exit code. It may wait long, for hosts and stores: it is for a thread of its own."""

    def __init__(self, ranks: Ranks, hosts: Hosts, processes: RankProcesses, ends: Path) -> None:
        self._ranks, self._hosts, self._processes, self._ends = ranks, hosts, processes, ends
        self.are_late = False
        """Ranks were killed after their grace period."""
        self.is_waiting = True
        """No ranks are there, and none end: a rendezvous, or a pause."""
        self.is_over = threading.Event()
        """Another host has ended the job."""
        self._record: AttemptRecord | None = None
        self._own = HashStore() if hosts.store[1] == 0 else None

    @property
    def _is_stopped(self) -> bool:
        return self._processes.none_more.is_set()

    def run(self) -> int:
        gone_s: float | None = None
        while True:
            try:
                job, handler = self._connect()
                gone_s = None
                return self._attempts(job, handler)
            except StoreGone:
                self.is_waiting = True
                ends = self._processes.ends()  # torch's agent has told them to save and leave
                code = outcome([end.code if end else EXIT_REQUEUE for end in ends])
                if self._is_stopped or (ends and code != EXIT_REQUEUE):
                    return code
                if gone_s is None:
                    gone_s = time.monotonic()
                    say(f"{self._store} does not answer; {self._hosts.host} waits {STORE_S:.0f} s for it")
                elif time.monotonic() - gone_s > STORE_S:
                    say(f"{self._store} is gone; the same command goes on from the newest checkpoint")
                    return EXIT_CUT_OFF
                self._processes.none_more.wait(1.0)

    @property
    def _store(self) -> str:
        return "the job's store at {}:{}".format(*self._hosts.store)

    def _connect(self) -> tuple[JobRecord, RendezvousHandler]:
        hosts = self._hosts
        record, heard, meeting = (self._own_or_connected() for _ in range(3))
        job, theirs = (JobRecord(PrefixStore(f"normfree/{hosts.run_id}", store)) for store in (record, heard))
        threading.Thread(target=self._listen, args=(theirs,), name="job", daemon=True).start()
        handler = elastic.rendezvous(
            meeting,
            run_id=hosts.run_id,
            min_hosts=hosts.min_hosts,
            max_hosts=hosts.max_hosts,
            own_address=hosts.address,
            join_s=hosts.join_s,
        )
        return job, handler

    def _own_or_connected(self) -> Store:
        return job_store.connect(*self._hosts.store, wait_s=CONNECT_S) if self._own is None else self._own

    def _listen(self, job: JobRecord) -> None:
        """Ranks that still start cannot hear it from the ranks of other hosts."""
        with contextlib.suppress(DistError, UserError):
            while job.ended is None:
                time.sleep(LISTEN_S)
            self.is_over.set()

    def _attempts(self, job: JobRecord, handler: RendezvousHandler) -> int:
        host = self._hosts.host
        if job.is_left_out(host):
            say(f"{host} was left out of the run, for it failed again and again; mend it and launch anew")
            return EXIT_OURS
        while not self._is_stopped:
            try:
                verdict = self._attempt(job, handler)
            except Stopped:
                break
            except RendezvousClosedError:
                verdict = None
            except RendezvousTimeoutError:
                least, join_s = self._hosts.min_hosts, self._hosts.join_s
                say(f"not enough hosts came within {join_s:.0f} s: {host} is there, and at least {least} are needed")
                return self._end(job, handler, EXIT_OURS)
            if verdict is None:  # the job ended without this host
                ended = job.ended
                return EXIT_CUT_OFF if ended is None else ended
            if verdict.left_out:
                job.leave_out(verdict.left_out)
            if verdict.left_out == host:
                return EXIT_OURS
            if not verdict.goes_on:
                return self._end(job, handler, verdict.code)
            self.is_waiting = True
            self._processes.none_more.wait(verdict.pause_s)
        return self._end(job, handler, EXIT_REQUEUE)

    def _end(self, job: JobRecord, handler: RendezvousHandler, code: int) -> int:
        with contextlib.suppress(DistError, RendezvousError):  # the store is gone, with those who could read it
            code = job.end(code)
            handler.shutdown()
        return code

    def _attempt(self, job: JobRecord, handler: RendezvousHandler) -> Verdict | None:
        """None: the job has ended without this host."""
        ranks = self._ranks
        self.is_waiting, self._record = True, None
        with self._rank_environment() as environment:
            agent = elastic.Agent(
                handler,
                child_process.command(ranks.module, ranks.arguments, on_parent_death=signal.SIGTERM),
                processes=ranks.processes,
                environment=environment,
                start=self._start,
                grace_s=ranks.grace_s,
            )
            elastic.quiet_logs()
            result = agent.run()
        return self._judge(job, handler, agent.get_worker_group(), result) if result and self._record else None

    @contextlib.contextmanager
    def _rank_environment(self) -> Iterator[dict[str, str]]:
        """Of the ranks of an attempt, besides that of this process. Those of a single host need no port but on the loopback."""
        own = {**self._ranks.environment, rank_end.FOLDER: str(self._ends), JOB: self._hosts.run_id}
        threads = max(1, (os.cpu_count() or 1) // self._ranks.processes)
        own.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(threads)))
        if self._hosts.max_hosts > 1:
            yield child_process.changed_environment(own)
            return
        with child_process.rank_variables(self._ranks.processes) as variables:
            yield child_process.changed_environment({**own, **variables})

    def _start(self, group: WorkerGroup, start: Callable[[], dict[int, Any]]) -> dict[int, Any]:
        """Called by torch's agent when all hosts have met."""
        assert group.store is not None
        self._record = AttemptRecord(group.store, group_rank=group.group_rank, num_hosts=group.group_world_size)
        self._record.join(self._hosts.host)
        pids = self._processes.start(start)
        self.is_waiting = False
        if group.group_rank == 0 and self._hosts.max_hosts > 1:
            hosts, most, size = self._record.hosts(), self._hosts.max_hosts, group.workers[0].world_size
            few = f"; {most - len(hosts)} of {most} hosts are not there" if len(hosts) < most else ""
            say(f"{size} process{'es' * (size > 1)} on {', '.join(hosts)}{few}")
        return pids

    def _judge(self, job: JobRecord, handler: RendezvousHandler, group: WorkerGroup, result: RunResult) -> Verdict:
        """What all hosts do next."""
        assert self._record is not None
        report = self._report(group, result)
        self._record.report(report)
        is_well = outcome(report.codes) in (0, EXIT_REQUEUE) and not report.is_stopped
        wait_s = REPORT_S if any(report.codes) else FINISH_S
        reports = self._record.reports(wait_s, lambda: is_well and handler.num_nodes_waiting() > 0)
        hosts = self._record.hosts()
        verdict = judge(reports, hosts, is_growing=handler.num_nodes_waiting() > 0)
        limits = self._hosts.limits
        verdict, failures = limited(verdict, job.failures, now_s=time.time(), hosts=hosts, limits=limits)
        verdict, is_mine = self._record.agree(verdict)
        if is_mine:
            job.failures = failures
            if text := verdict.sentence(len(failures), limits):
                say(text)
        return verdict

    def _report(self, group: WorkerGroup, result: RunResult) -> HostReport:
        failures = result.failures
        for rank, failure in list(failures.items())[:1]:  # the others' ends may be what torch's agent did
            text = "" if self.are_late else death(rank, failure.pid, failure.exitcode)
            if text:
                goes_on = (
                    "" if self._hosts.limits.max_restarts else "; the same command goes on from the newest checkpoint"
                )
                say(text + goes_on)
        codes, is_signalled = list[int](), False
        for worker in group.workers:
            end = self._processes.end_of(worker.id)
            if end is not None:
                # Where one has failed, the others got their signal from torch's agent.
                is_signalled = is_signalled or (end.is_signalled and not failures)
                codes.append(end.code)
                continue
            code = failures[worker.global_rank].exitcode if worker.global_rank in failures else 0
            codes.append(EXIT_REQUEUE if self.are_late and code == -signal.SIGKILL else code)
        return HostReport(
            host=self._hosts.host,
            codes=tuple(codes),
            is_stopped=self._is_stopped or is_signalled,
            has_main=any(worker.global_rank == 0 for worker in group.workers),
        )
