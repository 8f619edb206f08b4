"""The scheduler's jobs as a searcher of Ray Tune."""

from typing import Any

from ray.tune.search import Searcher

from transfer.sweep.scheduler import Conductor, Job


class JobQueue(Searcher):
    """The conductor as Tune's searcher."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__(metric="accuracy", mode="max")
        self._conductor = conductor
        self._jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> Any:
        job = self._conductor.next_job(trial_id)
        if job is None:
            # A search that is over may release final trials, so the end is the end only when nothing runs any more.
            return None if self._jobs else Searcher.FINISHED
        self._jobs[trial_id] = job
        return job

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._conductor.reported(trial_id, self._jobs[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self._jobs.pop(trial_id)
        if result is not None and not error:
            self._conductor.reported(trial_id, job, result)
        self._conductor.ended(trial_id, job, crashed=error)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its searcher to disk; ours is the ledger

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise RuntimeError("a sweep goes on from its ledger, not from Tune's memory")
