"""The list of scenarios: what is done to a run, and what the documentation says it does about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from orchestration.operations.drill import crashes, mistakes, outages
from orchestration.operations.drill.play import Play
from pipeline.errors import UserError


@dataclass(frozen=True)
class Scenario:
    name: str
    done: str
    expected: str
    play: Callable[[Play], None]
    min_ranks: int = 1
    num_hosts: int = 1
    """Between which the ranks are divided."""
    needs_undisturbed: str | None = ""
    """The data that are skipped in the undisturbed run with which it compares itself."""


# Played in this order, some at a time: the longest come first, so that short ones fill the end.
SCENARIOS = (
    Scenario(
        "lost_host",
        "one of two hosts (agents on this machine) goes with all its processes",
        "the other one regroups and goes on alone from the newest checkpoint",
        crashes.lost_host,
        min_ranks=2,
        num_hosts=len(crashes.HOSTS),
    ),
    Scenario(
        "failing_store",
        "an object store that answers every request with an error until the run has ended",
        "training goes on; the last state is kept on this machine, and the same command takes it over",
        outages.failing_store,
    ),
    Scenario(
        "kill_rank",
        "SIGKILL of one rank",
        "the others end, and the run goes on from the newest checkpoint",
        crashes.kill_rank,
    ),
    Scenario(
        "kill_all",
        "SIGKILL of all processes of the run at once",
        "the same command goes on from the newest checkpoint",
        crashes.kill_all,
    ),
    Scenario(
        "freeze",
        "SIGSTOP of one rank",
        "within the watchdog's limit all ranks leave with a report that names it; the run goes on from the newest checkpoint",
        crashes.freeze,
        min_ranks=2,
    ),
    Scenario(
        "sigterm",
        "SIGTERM, as a scheduler sends it",
        "the run saves and ends with code 75; the same command goes on",
        crashes.stop_signal,
    ),
    Scenario(
        "nan",
        "three batches in a row that are not finite on one rank",
        "all ranks skip the updates and go back to the newest checkpoint; the run ends as one that skips these data",
        crashes.nan_batches,
        needs_undisturbed=crashes.skipped_data(),
    ),
    Scenario(
        "full_disk",
        "no space for the first checkpoint",
        "the run goes on, and later checkpoints stand",
        outages.full_disk,
    ),
    Scenario(
        "slow_store",
        "an object store that answers after 0.2 s and takes 8 MB/s",
        "the run ends with the same weights",
        outages.slow_store,
    ),
    Scenario(
        "dead_tracker",
        "an MLflow server that answers nothing",
        "the run ends with 0, its records are on disk",
        outages.dead_tracker,
    ),
    Scenario(
        "corrupt_shard",
        "a flipped byte in an image that the run trains on",
        "the image is counted and replaced where the budget of unreadable images allows one; else the run ends with code 2",
        mistakes.corrupt_shard,
        needs_undisturbed=None,
    ),
    Scenario(
        "two_starts",
        "the same command while the run is at work",
        "the second one is refused with code 2, the first one is not disturbed",
        mistakes.two_starts,
    ),
    Scenario(
        "changed_data",
        "a restart on a dataset with a renamed class",
        "it is refused with code 2, and the run's folder stays as it is",
        mistakes.changed_data,
    ),
)


def not_playable(scenario: Scenario, num_ranks: int) -> str:
    """Why so many ranks do not allow it; nothing if they do."""
    if num_ranks < scenario.min_ranks:
        return f"needs {scenario.min_ranks} processes"
    return f"needs processes for {scenario.num_hosts} equal hosts" if num_ranks % scenario.num_hosts else ""


def chosen(names: Sequence[str]) -> list[Scenario]:
    """Those of these names, in the order of the list; all without a name. UserError for one that is not there."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
            raise UserError(f"no scenario {name!r}; {hint}")
    return [scenario for scenario in SCENARIOS if not names or scenario.name in names]
