"""What ranks send each other in a step, by collective: what the engine and DeepSpeed call, byte for byte.

Held against the operations that reach torch's process group, at all stages, by tests/pipeline/planning/test_collectives.py.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.engine.deepspeed_engine import BUCKET_ELEMENTS
from pipeline.fitting.parameters import ELEMENT, STAGE_3_WHOLE, Parameters

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
_STATISTICS = 5
"""Numbers that go with the sums of squares: loss, hits, images, stop requests, lost samples (`Engine.update`)."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    kind: Kind
    purpose: str
    total_bytes: int
    """Of one rank over all calls: what is reduced, or what is there in the end of a gathering."""
    calls: int

    @classmethod
    def of(cls, kind: Kind, purpose: str, total: int, calls: int) -> "Collective":
        return cls(kind=kind, purpose=purpose, total_bytes=total, calls=calls)


def step_collectives(
    parameters: Parameters, *, stage: int, world: int, accumulation: int, measured: bool = False
) -> list[Collective]:
    """Of one step that has others before it (the first of stage 3 gathers more, to learn the order of its modules).

    Args:
        measured: with the update's own size, as in steps that are reported.
    """
    whole = parameters.num_bytes
    sums = 0 if stage == 0 else ELEMENT * parameters.num_units * (6 if measured else 2)
    control = Collective.of("all_reduce", "clipping, statistics, stop flags", sums + ELEMENT * _STATISTICS, 1)
    own = [control] if world > 1 else []
    buckets = _buckets(parameters.each)
    if stage == 0:
        return [Collective.of("all_reduce", "gradients", whole, buckets), *own]
    if stage < 3:
        times = accumulation if stage == 2 else 1
        groups = parameters.padded_groups(world)
        return [
            Collective.of("all_reduce", "gradients", times * whole, times * buckets),
            *own,
            Collective.of("all_gather", "weights", sum(groups), len(groups)),
        ]
    gathered, small = parameters.padded(world, whole=False), parameters.padded(world, whole=True)
    num_small = sum(n <= STAGE_3_WHOLE for n in parameters.each)
    found = [
        Collective.of("reduce_scatter", "gradients", accumulation * parameters.padded(world), accumulation * buckets)
    ]
    if gathered:
        num_large = len(parameters.each) - num_small
        found.append(
            Collective.of("all_gather", "weights of layers", accumulation * gathered, accumulation * num_large)
        )
    found += own
    if num_small:
        found.append(Collective.of("all_gather", "small weights after the update", small, num_small))
    return found


def start_collectives(parameters: Parameters, *, stage: int, world: int) -> list[Collective]:
    """Of DeepSpeed's start: every weight from rank 0."""
    times = 2 if stage == 3 else 1
    each = len(parameters.each)
    found = [Collective.of("broadcast", "initial weights", times * parameters.num_bytes, times * each)]
    if stage == 3:
        found.append(Collective.of("all_gather", "initial weights", parameters.padded(world), each))
    return found


def by_kind(collectives: list[Collective]) -> dict[str, int]:
    """Bytes of each kind of collective."""
    found: dict[str, int] = {}
    for c in collectives:
        found[c.kind] = found.get(c.kind, 0) + c.total_bytes
    return found


def _buckets(elements: list[int]) -> int:
    """Calls that it takes to reduce all gradients, filled in their order."""
    calls, filled = 1, 0
    for n in elements:
        if filled and filled + n > BUCKET_ELEMENTS:
            calls, filled = calls + 1, 0
        filled += n
    return calls
