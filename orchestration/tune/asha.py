"""ASHA among the candidates of each cell, by Ray Tune's own scheduler; all that it is told and says is written down."""

import json
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from transfer.search.grids import ASHA_REDUCTION, grace_steps
from transfer.search.successive_halving import read_asha, write_asha
from transfer.sweep.cells import Cell, Sweep


class CellwiseAsha(FIFOScheduler):
    """ASHA among the search trials of one cell; everything else runs to its end.

    Ray's is the asynchronous stopping variant: what is stopped depends on which trial reaches a rung first. What it is told
    and what it says is written down in its order; a driver that starts again tells it the same first, so its verdicts go on
    from where they were, and anybody can play them again.
    """

    def __init__(self, sweep: Sweep, cells: Sequence[Cell]) -> None:
        super().__init__()
        self._sweep, self._cells = sweep, cells
        self._asha: dict[int, AsyncHyperBandScheduler] = {}
        self._events: dict[int, list[dict[str, Any]]] = {}

    def _of(self, trial: Any) -> AsyncHyperBandScheduler | None:
        job = trial.config
        if job["cell"] < 0 or job["trial"]["kind"] != "search" or self._cells[job["cell"]].space is not None:
            return None
        if job["cell"] not in self._asha:
            cell = self._cells[job["cell"]]
            self._asha[job["cell"]] = asha(cell)
            self._events[job["cell"]] = read_asha(self._sweep.out, cell.name)
            replay_asha(self._asha[job["cell"]], self._events[job["cell"]])
        return self._asha[job["cell"]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        asha = self._of(trial)
        if asha is not None:
            asha.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        asha = self._of(trial)
        if asha is None or "accuracy" not in result:
            return str(FIFOScheduler.CONTINUE)
        verdict = str(asha.on_trial_result(tune_controller, trial, result))
        job = trial.config
        event = {"trial": job["trial"], "step": result["step"], "accuracy": result["accuracy"]}
        events = self._events[job["cell"]]
        events.append({**event, "verdict": verdict, "time_s": time.time()})
        write_asha(self._sweep.out, self._cells[job["cell"]].name, events)
        return verdict


def asha(cell: Cell) -> AsyncHyperBandScheduler:
    """Ray's ASHA with this house's settings, for one cell."""
    return AsyncHyperBandScheduler(
        time_attr="step",
        metric="accuracy",
        mode="max",
        max_t=max(int(p["num_steps"]) for p in cell.points) + 1,  # an end is not a rung: nobody is stopped there
        grace_period=grace_steps(cell.points),
        reduction_factor=ASHA_REDUCTION,
    )


def replay_asha(scheduler: AsyncHyperBandScheduler, events: Sequence[dict[str, Any]]) -> list[str]:
    """Tell a fresh ASHA what an earlier one was told, in that order; its verdicts."""
    known: dict[str, Any] = {}
    verdicts = []
    for event in events:
        key = json.dumps(event["trial"], sort_keys=True)
        if key not in known:
            known[key] = SimpleNamespace(trial_id=f"earlier-{len(known)}", config={}, last_result={})
            scheduler.on_trial_add(None, known[key])
        result = {"step": event["step"], "accuracy": event["accuracy"]}
        verdicts.append(str(scheduler.on_trial_result(None, known[key], result)))
    return verdicts
