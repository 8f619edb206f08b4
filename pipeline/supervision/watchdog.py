"""A frozen rank becomes a named failure: all others leave within the set limit, and one report says who, where and why.

    each rank, a thread       says where its main thread is, in a key-value store that all reach; reads what the others say
    whoever sees it first     names the rank that the others wait for (`hang_detection`) and claims the report
    all ranks                 put their stacks into the store; a neighbour on its machine draws the frozen one's out of it
    the claimer               writes `hang-TIME.json` into the run's folder, one sentence on stderr; all leave, EXIT_HANG

The store is the one through which the processes found each other: the launcher's, or that of rank 0's process where there is
none; if that one freezes, its store does, and the others judge by what they heard last. No collective is used, and nothing here
runs on the main thread: a beat costs it nothing. Stop signals travel the same way (`pipeline.supervision.stop_signals`).
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.exchange import objects
from pipeline.storage.process_identity import machine
from pipeline.supervision import collective_progress, fault_points, hang_detection, hang_report, stack_dumps
from pipeline.supervision.attempt_store import AttemptStore, connect
from pipeline.supervision.hang_detection import JUDGED_AT, Beat, Heard, Suspect, WatchdogConfig
from pipeline.supervision.phase_clock import Clock
from pipeline.supervision.rank_environment import place
from pipeline.supervision.stop_signals import StopSignal, say

EXIT_HANG = 76
"""A rank froze; the report names it. The same command resumes from the newest checkpoint."""
BEAT_S = 1.0
BEATS_IN_LIMIT = 20
REPORT_S = 10.0

_num_watched = 0


class Watchdog:
    """From `with` on. `leave` ends the process at once, whatever its other threads do."""

    def __init__(
        self,
        config: WatchdogConfig,
        *,
        clock: Clock,
        stop: StopSignal,
        out: str,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        global _num_watched
        _num_watched += 1
        self.config, self._clock, self._stop, self._out, self._leave = config, clock, stop, out, leave
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        else:
            self.rank, self.size = (here := place()).rank, here.size
        self._main = threading.get_ident()
        self._name = f"normfree-watchdog/{_num_watched}"
        self._interval_s = min(BEAT_S, config.limit_s / BEATS_IN_LIMIT) if config.limit_s else BEAT_S
        self._report_s = min(REPORT_S, (1 - JUDGED_AT) * config.limit_s / 2)
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._dump = stack_dumps.Dump()
        self._machine = machine()
        self._number, self._mark, self._idle_s = 0, (0, 0), 0.0
        self._state = "start"
        self._heard = dict.fromkeys(range(self.size), Heard(None, 0.0))
        self._talked_s = time.monotonic()  # when the store last answered
        self._store_lost = ""
        self._deadline_s: float | None = None  # by then this process has left: somebody has named a rank
        self._is_reporting_alone = False

    def __enter__(self) -> "Watchdog":
        if self.size == 1:
            self._stop.told.set()
        if self.config.limit_s > 0:
            self._start(self._look)
        if self.size > 1:  # without a limit too: stop signals go this way
            self._clock.board = self._dump.__enter__().board
            self._start(self._talk)
        return self

    def __exit__(self, *_: object) -> None:
        self._state = "left"
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=self._report_s)
        self._clock.board = None
        self._dump.__exit__()

    def _start(self, work: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True))
        self._threads[-1].start()

    # --- this rank ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Watches this rank's own main thread, and the talk with the others, which may get stuck itself."""
        before_s = time.monotonic()
        while not self._closed.wait(self._interval_s):
            now_s = time.monotonic()
            # A process that was stopped for an hour must not count that hour against anybody.
            passed_s, before_s = min(now_s - before_s, 2 * self._interval_s), now_s
            mark = self._clock.ticks, fault_points.num_reached if self._clock.phase == "save" else 0
            self._idle_s = 0.0 if mark != self._mark else self._idle_s + passed_s
            self._mark = mark
            if self._deadline_s is not None:
                if now_s > self._deadline_s:
                    self._leave(EXIT_HANG)
            elif self._is_alone(now_s) and hang_detection.is_stuck(self._beat(), self.config):
                self._accuse_alone(now_s)

    def _is_alone(self, now_s: float) -> bool:
        """Nobody to ask: there is no other rank, or no store. What the caller does between records is no hang of a run alone."""
        if self.size == 1:
            return self._clock.phase != "log"
        return bool(self._store_lost) or now_s - self._talked_s > JUDGED_AT * self.config.limit_s

    def _beat(self) -> Beat:
        step = self._clock.steps_done()
        if self._state == "start" and not self._stop.is_starting:
            self._state = "run" if step != self._clock.first_step else "start"
        self._number += 1
        return Beat(
            rank=self.rank,
            number=self._number,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=self._machine,
            dump=self._dump.path,
            state=self._state,  # type: ignore[arg-type]
            phase="start" if self._stop.is_starting else self._clock.phase,
            step=step,
            idle_s=self._idle_s,
            collectives=collective_progress.entered(),
            begun=collective_progress.begun(),
            is_writing=any(t.name == "save" for t in threading.enumerate()),
            main_thread=self._main,
            stack=stack_dumps.of_thread(self._main),
        )

    # --- the others ---------------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        try:
            whole = connect(max(self.config.start_limit_s, self.config.limit_s))
            self._attempt = AttemptStore(whole, self._name, rank=self.rank)
            read_s, pause_s = 0.0, self._interval_s / 20  # the first beat must not miss a freeze right after the start
            while True:
                is_last = self._closed.is_set()
                if self._attempt.is_new():
                    self._heard = dict.fromkeys(range(self.size), Heard(None, 0.0))
                if self._attempt.store is None:  # rank 0 has not come yet
                    if is_last or self._closed.wait(pause_s):
                        return
                    pause_s = min(2 * pause_s, self._interval_s)
                    continue
                self._store = self._attempt.store
                self._store.set(f"beat/{self.rank}", self._beat().to_json())
                if self._attempt.is_sure:
                    self._pass_on_stop()
                if self._attempt.is_sure and self._store.add("claims", 0) > 0:
                    self._follow()
                elif not is_last and time.monotonic() - read_s >= self._read_every_s:
                    self._read_all(time.monotonic() - read_s if read_s else 0.0)
                    read_s = time.monotonic()
                self._talked_s = time.monotonic()
                if is_last:
                    return
                self._closed.wait(self._interval_s)
        except (RuntimeError, UserError) as error:  # torch's errors of stores are; and what no rank writes
            self._store_lost = " ".join(str(error).split())[:200] or type(error).__name__
            if self._is_reporting_alone:  # the store ended with the frozen rank, which was asked for its stack
                return
            if self._deadline_s is not None:
                self._leave(EXIT_HANG)
            elif not self._closed.is_set() and self.rank == (0 if self._has_launcher else 1):
                say(
                    f"the store of this run's processes is gone ({self._store_lost}); the ranks do not watch each other any more"
                )

    @property
    def _read_every_s(self) -> float:
        """Every rank reads what all say: with many ranks not with every beat."""
        return self._interval_s if self.size <= 16 else self.config.limit_s / BEATS_IN_LIMIT

    def _pass_on_stop(self) -> None:
        stop = self._stop
        if stop.requested and not stop.told.is_set():
            self._store.add("stopped in start" if stop.is_starting else "stopped", 1)
            stop.told.set()
        if not (stop.requested and stop.is_starting) and self._store.add("stopped in start", 0) > 0:
            stop.leave_start()
        elif not stop.requested and self._store.add("stopped", 0) > 0:
            stop.ask()  # and say so with the next beat: one that is still starting cannot save with the others

    def _read_all(self, passed_s: float) -> None:
        passed_s = min(passed_s, 2 * max(self._read_every_s, self._interval_s))
        there = [rank for rank in range(self.size) if self._store.check([f"beat/{rank}"])]
        said = dict(zip(there, self._store.multi_get([f"beat/{rank}" for rank in there]), strict=True))
        is_running = hang_detection.has_begun(self._heard)
        for rank, before in self._heard.items():
            beat = Beat.from_json(said[rank]) if rank in said else None
            is_new = beat is not None and (before.beat is None or beat.number != before.beat.number)
            self._heard[rank] = Heard(beat, 0.0 if is_new else before.age_s + passed_s)
            if rank == 0 and is_new and before.beat is not None:
                self._attempt.is_sure = True
        if hang_detection.has_begun(self._heard) and not is_running:  # a shorter limit counts from here
            self._heard |= {rank: Heard(None, 0.0) for rank, heard in self._heard.items() if heard.beat is None}
        if not self._attempt.is_sure and self._heard[0].age_s < JUDGED_AT * self.config.start_limit_s:
            return
        suspects = hang_detection.judge(self._heard, self.config)
        if suspects and self.config.limit_s > 0:
            self._accuse(suspects)

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _accuse(self, suspects: list[Suspect]) -> None:
        if self._store.add("claims", 1) > 1:  # another rank saw it at the same time
            return self._follow()
        self._deadline_s = time.monotonic() + 2 * self._report_s
        silent = [s.rank for s in suspects if s.is_silent]
        self._store.set("silent", json.dumps(silent))
        self._testify(silent)
        there = [r for r, h in self._heard.items() if h.beat is not None and h.beat.state != "left" and r not in silent]
        keys = [f"stacks/{rank}" for rank in there]
        seen = [rank for rank in silent if hang_detection.neighbour(self._heard, rank, silent) is not None]
        keys += [f"examined/{rank}" for rank in seen]
        self._publish(suspects, self._collect(keys))
        self._store.set("reported", "")
        time.sleep(self._interval_s)  # rank 0's process may be the store's, and the others are to hear it
        self._leave(EXIT_HANG)

    def _follow(self) -> None:
        """Another rank has named one: say what it needs to know, and leave when it is done."""
        self._deadline_s = time.monotonic() + 2 * self._report_s
        self._testify(objects.document(self._store.get("silent"), list[int]))
        self._store.wait(["reported"], timedelta(seconds=2 * self._report_s))
        self._leave(EXIT_HANG)

    def _testify(self, silent: list[int]) -> None:
        for key, stacks in self._evidence(silent):
            self._store.set(key, json.dumps(stacks))

    def _evidence(self, silent: list[int]) -> Iterator[tuple[str, Any]]:
        """Stacks of this rank, and of the silent ones that are its to look at."""
        yield f"stacks/{self.rank}", stack_dumps.of_all_threads(self._main)
        for rank in silent:
            beat = self._heard[rank].beat
            if beat is not None and hang_detection.neighbour(self._heard, rank, silent) == self.rank:
                yield f"examined/{rank}", stack_dumps.examine(beat.pid, beat.dump)

    def _collect(self, keys: list[str]) -> dict[str, Any]:
        """What comes of these within the time for it."""
        deadline_s, found = time.monotonic() + self._report_s, dict[str, Any]()
        while len(found) < len(keys) and time.monotonic() < deadline_s:
            came = [key for key in keys if key not in found and self._store.check([key])]
            found |= {key: objects.document(self._store.get(key), dict) for key in came}
            time.sleep(self._interval_s / 4)
        return found

    def _accuse_alone(self, now_s: float) -> None:
        """The store is silent, or there is none: by what was heard last, one rank reports and every rank leaves."""
        self._is_reporting_alone, self._deadline_s = True, now_s + 2 * self._report_s
        # This is the thread that holds others to the deadline: somebody must hold it, whatever it meets (a full disk).
        deadline = threading.Timer(2 * self._report_s, self._leave, (EXIT_HANG,))
        deadline.daemon = True
        deadline.start()
        if self._heard[self.rank].beat is None:
            self._heard[self.rank] = Heard(self._beat(), 0.0)
        silence = self._store_lost or f"silent for {now_s - self._talked_s:.0f} s"
        suspects, reporters = hang_detection.judge_alone(
            self._heard, rank=self.rank, has_launcher=self._has_launcher, idle_s=self._idle_s, silence=silence
        )
        if self.rank == min(reporters, default=self.rank):
            self._publish(suspects, dict(self._evidence([s.rank for s in suspects if s.is_silent])))
        else:
            time.sleep(self._report_s)  # the reporter's launcher would end it when another rank leaves
        self._leave(EXIT_HANG)

    @property
    def _has_launcher(self) -> bool:
        """The store lives in a launcher's process, not in rank 0's."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def _publish(self, suspects: list[Suspect], seen: dict[str, Any]) -> None:
        report = hang_report.compose(suspects, self._heard, seen, config=self.config, reporter=self.rank)
        where = hang_report.write(report, self._out, limit_s=self._report_s / 2)
        say(hang_report.sentence(report, where))
        sys.stderr.flush()
