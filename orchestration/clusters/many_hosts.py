"""A run on several machines over ssh: one console, one exit code, and nothing left running.

store                   a process of this one, through which agents and ranks find each other: no host's loss takes it away
one ssh a host          starts `orchestration.clusters.remote` there, which starts the host's agent
a host that is lost     is tried again with a growing pause; one that fails again and again is left out, by name
a signal                goes to all agents, whose ranks save; a second one means now
"""

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from orchestration.clusters import ssh
from orchestration.clusters.hosts import Host, compare
from orchestration.clusters.job import RESTART_WINDOW_S, Job, new_run_id
from orchestration.clusters.remote import BEAT_S, Ready, Start
from orchestration.clusters.ssh import Connection, Options
from orchestration.clusters.store_process import address_for, is_loopback, start_store
from orchestration.run.rank_end import EXIT_CUT_OFF, EXIT_OURS
from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.supervision.stop_signals import EXIT_REQUEUE, heeded, say

READY_S = 120.0
"""For ssh and for Python to start on a busy host."""
AT_ONCE = 64
"""Connections that are being made; sshd refuses more than a few at a time from one address."""
PAUSE_S, MAX_PAUSE_S = 5.0, 120.0
EMPTY_S = 600.0
"""Nothing has run anywhere for this long: no host comes back."""
MARGIN_S = 30.0


def launch(job: Job, hosts: Sequence[Host], environment: Mapping[str, str], options: Options) -> int:
    """Exit code of the run (0, 1, 2, 75, 76). UserError: a mistake that was seen before any rank started; nothing runs then."""
    job.check()
    return asyncio.run(_Launch(job, hosts, dict(environment), options).run())


@dataclass
class _Launch:
    job: Job
    hosts: Sequence[Host]
    environment: dict[str, str]
    options: Options
    open: dict[str, Connection] = field(default_factory=dict)
    """By label, those whose agent runs."""
    codes: list[int] = field(default_factory=list)
    """Of agents that ended by themselves, in that order."""
    left_out: list[str] = field(default_factory=list)
    asked: int = 0
    """Stop signals so far."""
    mistakes: list[str] = field(default_factory=list)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        before = {n: signal.getsignal(n) for n in heeded()}
        self.over, self.news, self.run_id = asyncio.Event(), asyncio.Event(), new_run_id()
        for number in before:
            loop.add_signal_handler(number, self._ask)
        store = None
        try:
            first = await self._connect_all()
            found = {c.host.label: c.ready for c in first if c.ready}
            compare(found, {c.host.label: c.ahead_s for c in first if c.ready}, self.job.processes)
            address = self.options.store_address or address_for(list(found.values()))
            store, self.store = await asyncio.to_thread(start_store, address, self.options.store_port)
            keepers = [asyncio.create_task(self._keep(host, c)) for host, c in zip(self.hosts, first, strict=True)]
            await self._watch(keepers, store)
            for keeper in keepers:
                keeper.cancel()
            for problem in await asyncio.gather(*keepers, return_exceptions=True):
                if isinstance(problem, Exception):
                    raise problem
            if self.mistakes and not self.codes:
                raise UserError("; ".join(self.mistakes[:3]))
            return self._code()
        finally:
            await self._close()
            if store:
                store.kill()
                store.wait()
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _code(self) -> int:
        if not self.codes:
            return EXIT_REQUEUE if self.asked else EXIT_OURS
        # A host that was left out ends with 1, and the others decide.
        return next((code for code in self.codes if code != EXIT_OURS), EXIT_OURS)

    async def _connect_all(self) -> list[Connection]:
        """One connection a host, each of them ready; or, where --min-hosts allows it, some that failed."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(host: Host) -> Connection:
            async with gate:
                return await self._connect(host)

        found = await asyncio.gather(*(one(host) for host in self.hosts))
        failed = [c for c in found if not c.ready]
        if self.asked:
            raise SystemExit(EXIT_REQUEUE)
        enough = len(found) - len(failed) >= (self.job.first_hosts or len(self.hosts))
        if failed and not (enough and all(ssh.is_passing(c) for c in failed)):
            more = f"; and {len(failed) - 3} other hosts" if len(failed) > 3 else ""
            raise UserError("; ".join(map(ssh.why_lost, failed[:3])) + more)
        for c in failed:
            say(f"{ssh.why_lost(c)}; starting without it, and trying again")
        return found

    async def _connect(self, host: Host) -> Connection:
        """Until the host is ready, or its ssh has ended."""
        connection = await ssh.connect(host, self.options, self._show)
        deadline_s = time.monotonic() + READY_S
        while not connection.ready and not connection.reading.done():
            if time.monotonic() > deadline_s or self.asked:
                connection.errors.append(f"nothing came within {READY_S:.0f} s")
                connection.kill()
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                connection.kill()
                raise
        if connection.ready and not connection.reading.done():
            self.open[host.label] = connection
        return connection

    async def _keep(self, host: Host, connection: Connection) -> None:
        """This host's agent, again and again until the run is over or the host is left out."""
        pause_s, losses, attempt = PAUSE_S, list[float](), 0
        while True:
            if connection.ready and not connection.reading.done():
                connection.send({"start": asdict(self._start(host, connection.ready))})
                began_s = time.monotonic()
                await asyncio.shield(connection.reading)  # read on where this is cancelled: `_close` waits for it
                self.open.pop(host.label, None)
                if await self._is_verdict(connection, attempt) or self.asked or self.over.is_set():
                    self.news.set()
                    return
                now_s = time.monotonic()
                losses = [s for s in losses if now_s - s < RESTART_WINDOW_S] + [now_s]
                pause_s = PAUSE_S if now_s - began_s > MAX_PAUSE_S else pause_s
                if len(losses) > self.options.max_failures:
                    self.left_out.append(host.label)
                    say(f"{host.label} is left out: lost {len(losses)} times ({ssh.why_lost(connection)})")
                    self.news.set()
                    return
                say(f"{_lost(connection)}; trying again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)
            pause_s, attempt = min(2 * pause_s, MAX_PAUSE_S), attempt + 1
            connection = await self._connect(host)

    async def _is_verdict(self, connection: Connection, attempt: int) -> bool:
        """Whether what an agent ended with is the run's, and not the loss of its host."""
        code = connection.ended
        if connection.refused:
            if attempt == 0:
                self.mistakes.append(ssh.why_lost(connection))
                return True
            return False
        if code is None or code < 0 or code == EXIT_CUT_OFF:
            return False
        if (
            code == EXIT_REQUEUE and not self.asked
        ):  # all were stopped there by somebody else, or this one lost the others
            deadline_s = time.monotonic() + self.job.run.watchdog.grace_s + MARGIN_S
            while self.open and not self.codes:
                if time.monotonic() > deadline_s:
                    return False
                await asyncio.sleep(0.2)
        self.codes.append(code)
        if code == EXIT_OURS:
            self.left_out.append(connection.host.label)
        return True

    def _start(self, host: Host, ready: Ready) -> Start:
        own = "" if is_loopback(ready.address) and len(self.hosts) > 1 else ready.address
        document = self.job.document(
            run_id=self.run_id,
            store=self.store,
            host_name=host.label,
            interface=self.options.interface or ready.interface,
            address=own,
        )
        return Start(
            folder=self.options.folder,
            environment=self.environment,
            store=self.store,
            grace_s=self.job.run.watchdog.grace_s,
            document=document,
        )

    async def _watch(self, keepers: "Sequence[asyncio.Task[None]]", store: "subprocess.Popen[bytes]") -> None:
        """Until the run is over everywhere, or has no hosts any more; beats meanwhile."""
        grace_s = self.job.run.watchdog.grace_s
        ending_s, passed_on, full_s, beat_s = float("inf"), 0, time.monotonic(), 0.0
        while not all(keeper.done() for keeper in keepers):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), 0.2)
            self.news.clear()
            now_s = time.monotonic()
            if now_s - beat_s > BEAT_S:
                beat_s = now_s
                self._tell({"beat": True})
            if self.open:
                full_s = now_s
            if self.asked > passed_on:
                passed_on = self.asked
                self._tell({"signal": int(signal.SIGTERM)})
                ending_s = min(ending_s, now_s + grace_s + MARGIN_S)
            if ending_s < float("inf"):
                if now_s > ending_s or not self.open:
                    return
                continue
            if problem := self._problem(now_s - full_s, store):
                say(problem)
                self.codes.append(EXIT_OURS)
                self._tell({"signal": int(signal.SIGTERM)})
            if self.mistakes or problem or set(self.codes) - {EXIT_OURS}:
                self.over.set()
                ending_s = now_s + grace_s + MARGIN_S
            if self.mistakes:
                self._tell({"signal": int(signal.SIGTERM)})

    def _problem(self, empty_s: float, store: "subprocess.Popen[bytes]") -> str:
        """Why the run cannot go on, or nothing."""
        left = len(self.hosts) - len(self.left_out)
        if left < self.job.min_hosts:
            return (
                f"{left} hosts are left and --min-hosts is {self.job.min_hosts}: the run stops; "
                f"left out: {', '.join(self.left_out)}"
            )
        if empty_s > EMPTY_S:
            return (
                f"no host has been running for {empty_s:.0f} s: the run stops; the same command goes "
                "on from the newest checkpoint"
            )
        if store.poll() is not None:
            return f"the store of this launch has ended with code {store.returncode}: the run stops; the same command goes on"
        return ""

    def _tell(self, what: Mapping[str, object]) -> None:
        for connection in self.open.values():
            connection.send(what)

    def _ask(self) -> None:
        self.asked += 1
        self.news.set()

    async def _close(self) -> None:
        """End of input is the end for each host's process; then its ssh ends. What does not is killed."""
        for connection in self.open.values():
            connection.close()
        deadline_s = time.monotonic() + self.job.run.watchdog.grace_s + MARGIN_S
        for connection in list(self.open.values()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(connection.reading), max(0.1, deadline_s - time.monotonic()))
            connection.kill()
        self.open.clear()

    def _show(self, host: Host, line: str) -> None:
        width = max(len(h.label) for h in self.hosts)
        with contextlib.suppress(BrokenPipeError):
            print(terminal(f"{host.label:<{width}} | {line}"), flush=True)


def _lost(connection: Connection) -> str:
    if connection.ended is not None and connection.ended < 0:
        return f"the agent on {connection.host.label} was ended by signal {-connection.ended}"
    if connection.ended == EXIT_CUT_OFF:
        return f"{connection.host.label} lost the other hosts"
    return f"{connection.host.label} is lost ({ssh.why_lost(connection)})"
