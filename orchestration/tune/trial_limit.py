"""The time limit of a trial, held twice: by a clock in its own process, and by the driver, which a frozen process cannot stop.

    in the worker     C's clock ends the process wherever it hangs, with its Python stacks in Ray's log
    in the driver     some seconds later, for a process that is stopped, or stuck in the kernel: Ray kills it, signal 9

Both are set back when a trial of a probe job is over and the next one begins.
"""

import faulthandler
import time
from typing import Any

import ray
from ray import tune

GRACE_S = 10.0
"""The driver gives a worker this much longer than the limit, for the worker's own clock leaves stacks behind."""


class Watch:
    """Ends this process if a trial takes too long, wherever it hangs: the clock is C's, and asks Python for nothing."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._on()

    def _on(self) -> None:
        if self._limit_s:
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=2)

    def off(self) -> None:
        if self._limit_s:
            faulthandler.cancel_dump_traceback_later()

    def reporting(self, report: Any) -> Any:
        """`report`, with the clock set back for the job's next trial when one is over."""

        def tell(row: dict[str, Any]) -> None:
            if "digest" in row:
                self._on()
            report(row)

        return tell


class Overdue(tune.Callback):
    """Tune's callback in the driver: kills the process of a trial that is long past its limit.

    Its death ends the trial like any other's; the conductor knows the limit and says so in the failed entry.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._running: dict[str, tuple[Any, float]] = {}
        """Trial and when its clock was last set back, by id."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running[trial.trial_id] = trial, time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "digest" in result and trial.trial_id in self._running:
            self._running[trial.trial_id] = trial, time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.pop(trial.trial_id, None)

    on_trial_error = on_trial_complete

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if not self._limit_s:
            return
        now_s = time.monotonic()
        for trial_id, (trial, begin_s) in list(self._running.items()):
            actor = trial.temporary_state.ray_actor
            if now_s - begin_s > self._limit_s + GRACE_S and actor is not None:
                del self._running[trial_id]
                ray.kill(actor)  # the raylet tries politely for some seconds, then sends signal 9
