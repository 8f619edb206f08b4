"""How a run ends: finished, stopped by a signal, at the step that its caller asked for, or over its budget of lost samples.

All ranks call the same function at the same step.
"""

from collections.abc import Iterator

from pipeline import distributed
from pipeline.errors import UserError
from pipeline.records import Finished, Record, Stopped
from pipeline.supervision.stop_signals import A_SIGNAL
from pipeline.training.trainer import Job


def leave_over_budget(job: Job) -> Iterator[Record]:
    """Ends the run on all ranks where the step lost more than is allowed; it was not applied, what came before is saved."""
    error = job.account.over_budget
    if error is None:
        return
    yield from job.account.write(job.step, final=True)
    yield from job.save_last(if_any=job.run.save_every is not None)
    raise error


def leave_stopped(job: Job) -> Iterator[Record]:
    """All ranks have agreed to stop before the same step: it is saved, if it is not yet, and the run ends."""
    yield from job.save_last()
    reasons = distributed.gather(job.world, job.stop.reason)
    # That of a rank that has one of its own, or rank 0's.
    reason = next((reason for reason in reasons if reason != A_SIGNAL), A_SIGNAL)
    newest = job.saver.newest
    if job.saver.newest_step < job.step:
        reason += f"; step {job.step} could not be saved ({job.saver.last_error})"
    yield Stopped(step=job.step, checkpoint=newest.url if newest else None, reason=reason)
    job.engine.close()


def leave_unfinished(job: Job) -> Iterator[Record]:
    """The caller wants no more than these steps for now: they are evaluated and saved, and the run can go on from there.

    A run that was killed after that save comes here at once, with the same numbers.
    """
    if job.eval_data is not None:
        yield from job.evaluate()
        if job.must_leave:
            yield from leave_stopped(job)
            return
    yield from job.save_last()
    if job.saver.newest_step < job.step:
        raise UserError(f"step {job.step} could not be saved ({job.saver.last_error}); mend that and start again")
    job.engine.close()


def finish(job: Job) -> Iterator[Record]:
    """All steps are done: the last evaluation, the last checkpoint, the account of the samples.

    Raises:
        UserError: the last checkpoint does not stand, so that the exit code reports it.
    """
    if job.eval_data is not None:
        yield from job.evaluate()
        if job.must_leave:
            yield from leave_stopped(job)
            return
    yield from job.save_last(if_any=job.run.save_final)
    job.engine.close()
    yield from job.account.close(job.step)
    newest = job.saver.newest
    if job.run.save_final and job.saver.newest_step < job.step:
        raise UserError(
            f"all {job.step} steps are done, but the last checkpoint could not be written ({job.saver.last_error}); "
            "mend that and run the same command again"
        )
    yield Finished(
        step=job.step,
        checkpoint=newest.url if newest else None,
        samples=(job.step - job.first_step) * job.run.global_batch,
        seconds_s=job.clock.elapsed_s,
        evaluation=job.evaluation,
    )
