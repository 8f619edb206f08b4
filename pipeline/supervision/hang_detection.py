"""Who is it that all others wait for? Signs of life of all ranks, and the judgement over them: pure functions.

A rank that waits in a collective cannot tell who is missing. So every rank says, again and again, where its main thread is,
for how long that has not moved, and how many collectives it has entered: all ranks enter the same ones in the same order, so
the one that the others wait for is the one that has entered fewest. One that says nothing any more needs no such proof.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from pipeline.configuration import check_fields
from pipeline.exchange import objects
from pipeline.field_types import Seconds


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """How long a run may stand still; nothing here decides a number of the run."""

    limit_s: Seconds = 60.0
    """All ranks leave within this time after one of them has frozen, or stands still in a step, its data or an evaluation; 0:
    nobody watches."""
    start_limit_s: Seconds = 1800.0
    """The same, of a main thread that stands still before the end of the first step."""
    save_limit_s: Seconds = 900.0
    """The same, of a save that training waits for and that neither writes nor uploads anything."""
    grace_s: Seconds = 60.0
    """After a stop signal the process leaves within this time, saved or not."""

    def __post_init__(self) -> None:
        check_fields(self, "watchdog")


JUDGED_AT = 0.75
"""The share of a limit after which it is passed; the rest is for stacks, the report and the way out."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    number: int
    host: str
    pid: int
    machine: str
    """Equal for ranks that see each other's processes."""
    dump: str
    """File into which the process writes its stacks when it is told to by a signal; empty if it cannot."""
    state: Literal["start", "run", "left"]
    phase: str
    step: int
    """The last finished one."""
    idle_s: float
    """The main thread has given no sign of life for this long."""
    collectives: int
    """Entered so far."""
    begun: int | None = None
    """Of these, how many its device has begun, where it says (NCCL)."""
    is_writing: bool
    """A save is being written in the background."""
    main_thread: int
    stack: tuple[str, ...]
    """Of the main thread, innermost first."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: bytes) -> "Beat":
        """Raises UserError: the store may have no password (`pipeline.exchange`), so what stands there may be anything."""
        return objects.document(text, Beat, "what a rank says of itself in the ranks' store")


@dataclass(frozen=True)
class Heard:
    """A rank's newest beat, and for how long it has been the newest; None if it never said anything."""

    beat: Beat | None
    age_s: float


@dataclass(frozen=True)
class Suspect:
    rank: int
    is_silent: bool
    why: str


def limit_s(beat: Beat, config: WatchdogConfig) -> float:
    """How long the main thread may stand still where it is."""
    if beat.state == "start":
        return max(config.start_limit_s, config.limit_s)
    return max(config.save_limit_s, config.limit_s) if beat.phase == "save" else config.limit_s


def is_stuck(beat: Beat, config: WatchdogConfig) -> bool:
    return beat.state != "left" and beat.idle_s > JUDGED_AT * limit_s(beat, config)


def judge(heard: dict[int, Heard], config: WatchdogConfig) -> list[Suspect]:
    """The ranks that the others wait for in vain; none while there is reason to wait."""
    is_running = has_begun(heard)
    silent = [
        Suspect(rank, True, f"has {'given no sign of life' if h.beat else 'not been heard of'} for {h.age_s:.0f} s")
        for rank, h in sorted(heard.items())
        if _is_silent(h, config, is_running)
    ]
    if silent:
        return silent
    beats = [h.beat for _, h in sorted(heard.items()) if h.beat is not None]
    if len(beats) < len(heard) or not any(is_stuck(b, config) for b in beats):
        return []
    # Those that have left in good order have entered all collectives. One that left early has not, and holds up the others.
    fewest = min(b.collectives for b in beats)
    behind = [b for b in beats if b.collectives == fewest]
    # All have entered as many: the one whose device has not begun what the others' devices wait in.
    begun = [b.begun for b in behind if b.begun is not None]
    if len(begun) == len(beats) and min(begun) < max(begun):
        behind = [b for b in behind if b.begun == min(begun)]
    late = [b for b in behind if is_stuck(b, config)]
    if not late:
        gone = [b for b in behind if b.state == "left"]
        return [Suspect(b.rank, False, f"left after step {b.step} while others wait for it") for b in gone]
    # All wait for a save to end: for a rank that writes. The main rank writes last, as it waits for the others' parts.
    writing = [b for b in late if b.phase == "save" and b.is_writing]
    if writing and len(writing) <= len(late) and all(b.phase == "save" for b in late):
        late = [b for b in writing if b.rank > 0] or writing
    return [Suspect(b.rank, False, f"has not moved for {b.idle_s:.0f} s") for b in late]


def has_begun(heard: dict[int, Heard]) -> bool:
    """Some rank has finished a step. That takes all of them: the start is over for those too that have said nothing yet."""
    return any(h.beat is not None and h.beat.state == "run" for h in heard.values())


def _is_silent(heard: Heard, config: WatchdogConfig, is_running: bool) -> bool:
    if heard.beat is None:
        return heard.age_s > JUDGED_AT * (config.limit_s if is_running else max(config.start_limit_s, config.limit_s))
    return heard.beat.state != "left" and heard.age_s > JUDGED_AT * config.limit_s


def judge_alone(
    heard: dict[int, Heard], *, rank: int, has_launcher: bool, idle_s: float, silence: str
) -> tuple[list[Suspect], list[int]]:
    """The judgement of `rank` where the store does not answer, by what was heard last: suspects, and who may report them.

    Args:
        has_launcher: the store lives in a launcher's process on rank 0's machine, and not in rank 0's process.
        idle_s: the rank's own main thread has not moved for this long.
        silence: what is known of the store.
    """
    mine = Suspect(rank, False, f"has not moved for {idle_s:.0f} s")
    if len(heard) == 1:
        return [mine], [rank]
    if rank > 0 and heard[0].beat is None:
        return [Suspect(0, True, "has not been heard of")], list(range(1, len(heard)))
    beats = [h.beat for _, h in sorted(heard.items()) if h.beat is not None and h.beat.state != "left"]
    if not has_launcher:
        why = f"does not answer, and its process holds the run's store ({silence})"
        return [Suspect(0, True, why)], [b.rank for b in beats if b.rank > 0]
    here, main = _machine_of(heard, rank), _machine_of(heard, 0)
    gone = [b.rank for b in beats if b.machine == main != here]
    why = f"does not answer, nor does the run's store on its machine ({silence})"
    suspects = [Suspect(other, True, why) for other in gone] or [mine]
    reporters = [b.rank for b in beats if b.machine == here] if not gone else []
    return suspects, reporters or [b.rank for b in beats if b.rank not in gone]


def _machine_of(heard: dict[int, Heard], rank: int) -> str | None:
    beat = heard[rank].beat
    return None if beat is None else beat.machine


def neighbour(heard: dict[int, Heard], rank: int, silent: list[int]) -> int | None:
    """The lowest rank on the machine of a silent one that can look at it."""
    beats = [h.beat for _, h in sorted(heard.items()) if h.beat is not None]
    machine = next((b.machine for b in beats if b.rank == rank), None)
    can = (b.rank for b in beats if b.machine == machine and b.state != "left" and b.rank not in silent)
    return next(can, None)
