"""torch's profiler over a few steps of a run, on the main rank: a trace to look at, and tables.

    profiles/steps-10-13.json.gz    in the run's folder: Chrome's format, for https://ui.perfetto.dev or chrome://tracing

It looks on: no number of the run depends on it. Steps that are profiled take longer, and so the other ranks wait for this one.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from pipeline import places
from pipeline.profiling import table
from pipeline.profiling.asked import Steps
from pipeline.profiling.ranges import PREFIX, spans_on
from pipeline.records import Notice, Profiled, Record
from pipeline.storage import objects

FOLDER = "profiles"
MAX_BYTES = 256 << 20
"""Of a compressed trace; a larger one opens nowhere."""


class Profiler:
    """Asked at the top of each step (`at`), and left when no step follows."""

    def __init__(
        self,
        asked: Steps | None,
        out: str,
        *,
        is_main: bool,
        calls: Callable[[], list[tuple[Any, str]]],
        charge: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Args:
        calls: methods that reduce gradients, and are named so in the trace.
        charge: under which the time of writing a trace is counted.
        """
        self._asked, self._out, self._calls, self._charge = asked if is_main else None, out, calls, charge
        self._steps = range(0)
        self._num_seen = 0
        self._begin_s = self._end_s = 0.0
        self._inside = ExitStack()
        self._profile: Any = None

    def starts(self, done: int) -> Iterator[Record]:
        """The run goes on from step `done`."""
        if self._asked is None:
            return
        self._steps = self._asked.of_run(done)
        if not self._steps:
            text = f"--profile {self._asked}: those steps are done already (the run goes on from step {done}); none is profiled"
            yield Notice(step=done, text=text)

    def at(self, done: int) -> Iterator[Record]:
        """`done` steps are done, and another one, if any, comes next."""
        if self._profile is not None:
            yield from self._step(done)
        elif self._steps and done >= self._steps.start - 2:
            self._begin(warm_up=min(1, self._steps.start - 1 - done))

    def _begin(self, warm_up: int) -> None:
        last = warm_up + len(self._steps) - 1

        def schedule(step: int) -> torch.profiler.ProfilerAction:  # torch's own warns where there is no warm-up
            if step < warm_up:
                return torch.profiler.ProfilerAction.WARMUP
            late = torch.profiler.ProfilerAction.NONE if step > last else torch.profiler.ProfilerAction.RECORD_AND_SAVE
            return torch.profiler.ProfilerAction.RECORD if step < last else late

        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports stages, and an error where there is no GPU
        kinds = [torch.profiler.ProfilerActivity.CPU]
        kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._inside.enter_context(spans_on(self._calls(), "reduce"))
        self._profile = torch.profiler.profile(activities=kinds, schedule=schedule)
        self._inside.callback(self._profile.stop)
        self._profile.start()
        self._num_seen, self._begin_s = -warm_up, time.perf_counter()

    def _step(self, done: int) -> Iterator[Record]:
        self._num_seen += 1
        self._end_s = time.perf_counter()
        self._profile.step()
        if self._num_seen == 0:
            self._begin_s = time.perf_counter()
        if self._num_seen < len(self._steps):
            return
        self._inside.close()
        with self._charge():
            records = [*self._found(done)]
        self._profile, self._steps = None, range(0)
        yield from records

    def _found(self, done: int) -> Iterator[Record]:
        num, name = len(self._steps), f"steps-{self._steps.start}-{self._steps[-1]}.json.gz"
        events = [_event(e) for e in self._profile.events() if str(e.device_type).endswith("CPU")]
        url, size = objects.join(self._out, FOLDER, name), 0
        with places.temporary_folder("profile") as folder:
            file = Path(folder) / name
            self._profile.export_chrome_trace(str(file))
            size = file.stat().st_size
            if size <= MAX_BYTES:
                objects.put_file(file, url)
            else:
                text = f"the trace of these steps has {size:,} bytes, more than {MAX_BYTES:,}, and is not kept; profile fewer"
                yield Notice(step=done, text=text)
                url = ""
        wall_us = 1e6 * (self._end_s - self._begin_s)
        yield Profiled(
            step=done,
            first=self._steps.start,
            last=self._steps[-1],
            url=url,
            size_bytes=size,
            step_ms=wall_us / 1e3 / num,
            phases=tuple(table.phases(events, num_steps=num, wall_us=wall_us)),
            operations=tuple(table.operations(events, num_steps=num)),
        )

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        """A profile that is not whole is left out."""
        self._inside.close()


def _event(event: Any) -> table.Event:
    """Of torch's."""
    phase = event.name.removeprefix(PREFIX) if event.name.startswith(PREFIX) else ""
    return table.Event(
        name=event.name,
        begin_us=event.time_range.start,
        end_us=event.time_range.end,
        phase=phase,
        self_us=0.0 if event.is_user_annotation else event.self_cpu_time_total,
        device_us=0.0 if event.is_user_annotation else event.self_device_time_total,
    )
