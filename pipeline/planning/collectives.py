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


@dataclass(frozen=True)
class Collective:
    kind: Kind
    purpose: str
    total_bytes: int
    """Of one rank over all calls: what is reduced, or what is there in the end of a gathering."""
    calls: int


def step_collectives(parameters: Parameters, *, stage: int, world: int, accumulation: int) -> list[Collective]:
    """Of one step that is not reported and has others before it (the first of stage 3 gathers more, to learn the order of its
    modules)."""
    whole = parameters.num_bytes
    sums = 0 if stage == 0 else 2 * ELEMENT * parameters.num_units
    control = Collective("all_reduce", "clipping, statistics, stop flags", sums + ELEMENT * _STATISTICS, 1)
    own = [control] if world > 1 else []
    buckets = _buckets(parameters.each)
    if stage == 0:
        return [Collective("all_reduce", "gradients", whole, buckets), *own]
    if stage < 3:
        times = accumulation if stage == 2 else 1
        groups = parameters.padded_groups(world)
        return [
            Collective("all_reduce", "gradients", times * whole, times * buckets),
            *own,
            Collective("all_gather", "weights", sum(groups), len(groups)),
        ]
    gathered, small = parameters.padded(world, whole=False), parameters.padded(world, whole=True)
    num_small = sum(n <= STAGE_3_WHOLE for n in parameters.each)
    found = [Collective("reduce_scatter", "gradients", accumulation * parameters.padded(world), accumulation * buckets)]
    if gathered:
        num_large = len(parameters.each) - num_small
        found.append(Collective("all_gather", "weights of layers", accumulation * gathered, accumulation * num_large))
    found += own
    if num_small:
        found.append(Collective("all_gather", "small weights after the update", small, num_small))
    return found


def _buckets(elements: list[int]) -> int:
    """Calls that it takes to reduce all gradients, filled in their order."""
    calls, filled = 1, 0
    for n in elements:
        if filled and filled + n > BUCKET_ELEMENTS:
            calls, filled = calls + 1, 0
        filled += n
    return calls
