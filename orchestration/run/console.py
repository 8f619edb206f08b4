"""What a person sees of a run: the plan before it, a live line during it, what was made and what comes next after it.

A reader of records like the others; only rank 0 has one. With a terminal the line is live; without one (a log file,
CI) the same facts come as plain lines, at most one every ten seconds besides the events, which always show.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from orchestration.run.lines import duration, plan_lines, size, step_line
from orchestration.run.time_left import TimeLeft
from pipeline.display import terminal
from pipeline.profiling.table import lines
from pipeline.records import (
    Accounted,
    Changed,
    Deviation,
    Evaluation,
    Finished,
    Lost,
    Notice,
    PassedOver,
    Phase,
    Profiled,
    Record,
    RolledBack,
    Saved,
    SaveFailed,
    SaveSkipped,
    Skipped,
    Started,
    Step,
    Stopped,
)

PLAIN_INTERVAL_S = 10.0
BAR_CELLS = 24


class Console:
    """Shows records. `live` None means: if `stream` is a terminal."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import rich.console

        self._stream = stream or sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - None where stdout was closed (>&-)
        self._is_live = self._stream.isatty() if live is None else live
        self._rich = rich.console.Console(
            file=self._stream, highlight=False, soft_wrap=True, force_terminal=self._is_live or None
        )
        self._next_command = ""
        self._interval_s, self._clock = interval_s, clock
        self._live: Any = None
        self._last_plain_s = float("-inf")
        self._started: Started | None = None
        self._step: Step | None = None
        self._phase = ""
        self._time_left = TimeLeft()
        self._left_s = math.inf
        self._num_skipped = 0
        self._best: Evaluation | None = None
        self._shows: dict[type[Record], Callable[[Any], None]] = {
            Phase: self._read_phase,
            Started: self._read_started,
            PassedOver: self._read_passed_over,
            Step: self._read_step,
            Skipped: self._read_skipped,
            RolledBack: self._read_rolled_back,
            Evaluation: self._read_evaluation,
            Saved: self._read_saved,
            Profiled: self._read_profiled,
            Lost: self._read_lost,
            Accounted: self._read_accounted,
            Notice: self._read_notice,
            Changed: self._read_notice,
            Deviation: self._read_deviation,
            SaveFailed: self._read_missed,
            SaveSkipped: self._read_missed,
            Finished: self._read_finished,
            Stopped: self._read_stopped,
        }

    def read(self, record: Record, *, next_command: str = "") -> None:
        """Shows one record. `next_command` is what the closing block offers after Finished and Stopped."""
        self._next_command = next_command
        show = self._shows.get(type(record))
        if show is not None:
            show(record)

    def close(self) -> None:
        """Takes the live line down; safe to call twice, and after an exception."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _read_phase(self, phase: Phase) -> None:
        self._phase = phase.name
        if self._is_live:
            self._refresh()
        else:
            self._say(phase.name, style="dim")

    def _read_started(self, started: Started) -> None:
        self._started = started
        for name, text in plan_lines(started):
            self._say(f"{name:>10}  {text}", style="bold" if name == "run" else None)

    def _read_passed_over(self, passed: PassedOver) -> None:
        self._say(f"passed over  {passed.url}: {passed.reason}; it is kept where it is", style="yellow")

    def _read_step(self, step: Step) -> None:
        self._step = step
        now_s = self._clock()
        left_s = self._time_left.left_s(step.step, self._started.total_steps, now_s) if self._started else None
        self._left_s = step.remaining_s if left_s is None else left_s
        if self._is_live:
            self._refresh()
            return
        is_last = self._started is not None and step.step >= self._started.total_steps
        if is_last or now_s - self._last_plain_s >= self._interval_s:
            self._last_plain_s = now_s
            self._say(step_line(step, self._started, self._left_s))

    def _read_skipped(self, skipped: Skipped) -> None:
        self._num_skipped += 1
        first = ", ".join(skipped.keys[:3])
        self._say(
            f"skipped  the update after step {skipped.step}: {skipped.reason}; "
            f"{len(skipped.keys)} samples skipped{f' ({first} ...)' if first else ''}",
            style="yellow",
        )

    def _read_rolled_back(self, back: RolledBack) -> None:
        self._say(
            f"back     {back.reason}; going on from {back.checkpoint} at step {back.step} without their {len(back.keys)} samples",
            style="yellow",
        )

    def _read_evaluation(self, evaluation: Evaluation) -> None:
        is_best = self._best is None or evaluation.top1 > self._best.top1
        self._best = evaluation if is_best else self._best
        self._say(
            f"evaluated  step {evaluation.step}: top-1 {evaluation.top1:.2%}, top-5 {evaluation.top5:.2%}, "
            f"loss {evaluation.loss:.4f} on {evaluation.num_samples:,} images of {evaluation.split} "
            f"({evaluation.weights} weights, {duration(evaluation.seconds_s)})",
            style="green",
        )

    def _read_saved(self, saved: Saved) -> None:
        stalled = f", training waited {duration(saved.stalled_s)}" if saved.stalled_s >= 0.05 else ""
        self._say(
            f"saved  step {saved.step}: {saved.url} ({size(saved.size_bytes)}, {duration(saved.seconds_s)}{stalled})"
        )
        if saved.note:
            self._say(f"       {saved.note}", style="yellow")

    def _read_missed(self, missed: SaveFailed | SaveSkipped) -> None:
        self._say(
            f"not saved  step {missed.step}: {missed.reason}; training goes on "
            f"({missed.num_missed} missed since the last checkpoint)",
            style="red",
        )

    def _read_profiled(self, found: Profiled) -> None:
        where = (
            f"{found.url} ({size(found.size_bytes)}; open it at https://ui.perfetto.dev)" if found.url else "no trace"
        )
        self._say(f"profiled  steps {found.first} to {found.last}, {found.step_ms:.4g} ms each: {where}", style="green")
        for line in (*lines("phase", found.phases), *lines("operation, by itself", found.operations)):
            self._say(f"  {line}")

    def _read_lost(self, lost: Lost) -> None:
        first = lost.samples[0]
        more = f", and {len(lost.samples) - 1} more" if len(lost.samples) > 1 else ""
        self._say(
            f"lost  step {lost.step}: {first['key']} of {first['shard']}: {first['reason']}{more}; "
            f"others took their places ({lost.num_epoch} lost in this epoch, {lost.num_allowed} are allowed)",
            style="yellow",
        )

    def _read_accounted(self, page: Accounted) -> None:
        parts = [f"{page.used:,} used"]
        for name in ("skipped", "dropped", "excluded"):
            number = getattr(page, name)
            parts += [f"{number:,} {name}"] if number else []
        which = "all passes" if page.epoch is None else f"pass {page.epoch}"
        self._say(
            f"accounted  {which} over {page.source}: {' + '.join(parts)} = {page.manifest:,} in the manifest"
            + (f"; {page.repeated:,} repeated" if page.repeated else "")
        )

    def _read_notice(self, notice: Notice | Changed) -> None:
        self._say(f"note  {notice.text}", style="yellow")

    def _read_deviation(self, found: Deviation) -> None:
        head = "WRONG RESUME" if found.is_certain else "ODD RESUME  "
        self._say(f"{head}  step {found.step}: {found.text}", style="bold red")

    def _read_finished(self, finished: Finished) -> None:
        self.close()
        self._say("")
        head = f"{self._started.run_name} is done" if self._started else "done"
        result = ", ".join(
            f"{name} {value:.2%}" if name.startswith("top") else f"{name} {value:.4f}"
            for name, value in finished.evaluation.items()
        )
        self._say(
            f"{head}: {finished.step:,} steps, {finished.samples:,} images, {duration(finished.seconds_s)}", "bold"
        )
        rows = [("result", result), ("made", finished.checkpoint or ""), ("next", self._next_command)]
        if self._num_skipped:
            rows.insert(1, ("skipped", f"{self._num_skipped} updates that were not finite"))
        self._print_rows(rows)

    def _read_stopped(self, stopped: Stopped) -> None:
        self.close()
        self._say("")
        self._say(f"stopped at step {stopped.step:,}: {stopped.reason}", style="yellow")
        self._print_rows([("saved", stopped.checkpoint or "nothing yet"), ("go on", self._next_command)])

    def _print_rows(self, rows: list[tuple[str, str]]) -> None:
        for name, text in rows:
            if text:
                self._say(f"{name:>10}  {text}")

    def _say(self, text: str, style: str | None = None) -> None:
        from rich.text import Text

        # Text and not markup: a file name with brackets must come out as it is.
        self._rich.print(Text(terminal(text, keep_lines=True), style=style or ""))
        if not self._is_live:
            self._stream.flush()

    def _refresh(self) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(get_renderable=self._render, console=self._rich, refresh_per_second=4, transient=True)
            self._live.start()

    def _render(self) -> Any:
        from rich.spinner import Spinner
        from rich.text import Text

        if self._step is None or self._started is None:
            return Spinner("dots", Text(self._phase, no_wrap=True))
        done = min(1.0, self._step.step / max(1, self._started.total_steps))
        text = step_line(self._step, self._started, self._left_s)
        # On a narrow terminal the bar gives way first, and then the end of the line, where the least urgent stands.
        width = max(0, min(BAR_CELLS, self._rich.width - len(text) - 2))
        cells = round(done * width)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append("━" * cells, style="cyan").append("·" * (width - cells), style="bright_black")
        line.append(" " * (width > 0) + text)
        if self._phase and self._phase != "training":
            line.append(f"  [{self._phase}]", style="dim")
        return line
