"""Memory of one device in training, at the moment when most of it is used: what the engine and DeepSpeed hold, and activations.

A step has four such moments: the forward pass in stage 3, somewhere in the backward pass, the reduction of gradients at its end,
and the update. What DeepSpeed holds was read in 0.19.8 and measured: tests/pipeline/fitting/test_memory.py holds the sum
against the peak of real runs on a CPU. There a buffer counts as far as it has been written to; on a GPU it counts whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nfnet.analysis.step_profile import StepProfile
from pipeline.engine.deepspeed_engine import BUCKET_ELEMENTS
from pipeline.fitting.parameters import ELEMENT, Parameters

BUCKET = ELEMENT * BUCKET_ELEMENTS
PREFETCHED = ELEMENT * 50_000_000
"""Of weights that stage 3 gathers ahead (stage3_prefetch_bucket_size's default)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    parts: Mapping[str, int]
    """At the fullest moment: weights, master weights, momentum, averages, gradients, buffers, activations; what is nothing is
    left out."""
    moment: str
    """forward pass, backward pass, reduction or update."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(
    parameters: Parameters,
    profile: StepProfile,
    *,
    stage: int,
    world: int,
    micro_batch: int,
    accumulation: int,
    averages: bool,
    num_moments: int = 1,
    is_cpu: bool = False,
) -> Memory:
    """Without the fixed cost of a process (context, libraries, workspaces of convolutions). `num_moments`: states that the
    optimiser keeps of a weight."""
    whole, share = parameters.num_bytes, parameters.share(stage, world)
    state = {"momentum": num_moments * share, "averages": share if averages else 0}
    if stage == 0:
        state |= {"weights": whole}
    else:
        state |= {"master weights": share, "weights": sum(parameters.padded_groups(world)) if stage < 3 else share}
    if stage == 3:
        state |= {"gradients": share}
    moments = {
        "backward pass": _backward(stage, whole, share, profile, micro_batch, accumulation, is_cpu),
        "reduction": _reduction(stage, whole, share, parameters.padded(world), accumulation, is_cpu),
        "update": _update(stage, whole, share, is_cpu),
    }
    if stage == 3:
        moments["forward pass"] = _forward(whole, profile, micro_batch, is_cpu)
    sums = {name: _sum(state, extra) for name, extra in moments.items()}
    moment = max(sums, key=lambda name: sum(sums[name].values()))
    order = ("weights", "master weights", "momentum", "averages", "gradients", "buffers", "activations")
    return Memory(parts={k: sums[moment][k] for k in order if sums[moment].get(k)}, moment=moment)


def _sum(state: dict[str, int], extra: dict[str, int]) -> dict[str, int]:
    return {k: state.get(k, 0) + extra.get(k, 0) for k in {**state, **extra}}


def _forward(whole: int, profile: StepProfile, micro_batch: int, is_cpu: bool) -> dict[str, int]:
    # What is gathered ahead is one piece, from which each weight is copied when it is needed; it goes with the last of them.
    gathered = min(whole, PREFETCHED) + (min(whole, BUCKET) if is_cpu else BUCKET)
    return {"activations": profile.fullest_forward(micro_batch), "weights": min(whole, 2 * BUCKET), "buffers": gathered}


def _backward(
    stage: int, whole: int, share: int, profile: StepProfile, micro_batch: int, accumulation: int, is_cpu: bool
) -> dict[str, int]:
    if stage in (0, 1):
        # Gradients gather as activations go; those of an earlier micro-batch are there from the beginning.
        is_first = accumulation == 1
        alive, gathered = profile.fullest(micro_batch, weight_of_gradients=1.0 if is_first else 0.0)
        return {"activations": alive, "gradients": gathered if is_first else whole}
    bucket = min(whole, BUCKET) if is_cpu else BUCKET
    if stage == 2:  # until there are enough of them to be sent
        alive, gathered = profile.fullest(micro_batch, weight_of_gradients=1.0)
        kept = share if accumulation > 1 else 0
        return {"activations": alive, "gradients": kept + min(gathered, BUCKET)}
    # Weights are gathered, up to 1e9 elements (stage3_max_live_parameters), and a layer's go when its gradient is there.
    alive, gathered = profile.fullest(micro_batch, weight_of_gradients=-1.0)
    return {"activations": alive, "weights": min(whole, 2 * BUCKET) - gathered, "buffers": bucket}


def _reduction(stage: int, whole: int, share: int, padded: int, accumulation: int, is_cpu: bool) -> dict[str, int]:
    bucket, flat = min(whole, BUCKET) if is_cpu else BUCKET, min(whole, BUCKET)
    if stage < 2:  # as many as are sent together are copied for it
        return {"gradients": whole, "buffers": flat}
    if stage == 2:
        return {"gradients": flat + (share if accumulation > 1 else 0), "buffers": flat}
    return {"buffers": bucket + min(padded, BUCKET) * (2 if is_cpu else 1)}


def _update(stage: int, whole: int, share: int, is_cpu: bool) -> dict[str, int]:
    if stage == 0:
        return {"gradients": whole}
    if stage < 3:
        return {"gradients": share, "buffers": share}
    return {"buffers": (min(whole, BUCKET) if is_cpu else BUCKET) + share}
