"""The user's configuration, small enough for a drill: the smoke variant of it, saved often, on ranks of this machine."""

from dataclasses import replace

from pipeline.data.loading.data_config import DataConfig
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.recipes.smoke_variants import BATCH, shrink
from pipeline.training.run import Run

SAVE_STEPS = 5
MIN_MICRO_BATCH = 2


def shrunk(run: Run, *, num_images: int, num_ranks: int, data: DataConfig) -> Run:
    """What stays besides the smoke variant's: whether gradients are accumulated, how checkpoints are kept, whether an
    unreadable image is allowed, the watchdog.

    Args:
        num_images: that the durations of `run` are for.
        data: the small copy of its data.
    Raises:
        UserError: there is no small form of its network.
    """
    try:
        small = shrink(run, num_images)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the drill needs a small form of the network, and {run.model.name} has none; set --model.name of a copy of the "
            "configuration to one of 'normfree inspect --list'"
        ) from error
    accumulation = 1 + _accumulates(run, num_ranks)
    micro_batch = max(MIN_MICRO_BATCH, run.data.repeats, BATCH // (num_ranks * accumulation))
    return replace(
        small,
        # Weights to begin with may lie where this machine does not reach; what they are changes nothing of a fault.
        model=replace(small.model, init_from=None, new_head=False),
        data=data,
        global_batch=micro_batch * num_ranks * accumulation,
        micro_batch=micro_batch,
        save_every=Duration(SAVE_STEPS, "steps"),
        saving=replace(small.saving, staging="", keep_every=None),
        log_every_steps=1,
        save_final=True,
    )


def _accumulates(run: Run, num_ranks: int) -> bool:
    return isinstance(run.micro_batch, int) and 0 < run.micro_batch * num_ranks < run.global_batch


def with_watchdog(run: Run, limit_s: float) -> Run:
    """The run with a shorter limit, where it has one: 0 stays, as nobody would watch the real run either."""
    return replace(run, watchdog=replace(run.watchdog, limit_s=min(run.watchdog.limit_s, limit_s)))
