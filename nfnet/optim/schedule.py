"""Learning rates as pure functions of the step (Brock et al. 2021, A.1)."""

import bisect
import math
from collections.abc import Sequence


def linear_scaling(base: float, global_batch: int) -> float:
    """base * global_batch / 256: the papers' rule, with base 0.1 for NFNets."""
    return base * global_batch / 256


def learning_rate(step: int, *, total_steps: int, warmup_steps: int = 0, peak: float, final: float = 0.0) -> float:
    """Linear warm-up from 0 over `warmup_steps`, then a half cosine from `peak` to `final` at `total_steps`.

    Update number `step` (from 0) uses this rate. Raises ValueError for a warm-up longer than the run.
    """
    if warmup_steps > total_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps is longer than the run of {total_steps}; shorten it")
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_rate(
    step: int, *, warmup_steps: int = 0, peak: float, decay_steps: Sequence[int], factor: float = 0.1
) -> float:
    """Linear warm-up from 0, then `peak` times `factor` once for each of `decay_steps` (rising) that lies behind.

    As in the code of BiT's HyperRule (Kolesnikov et al. 2020), update number `decay_steps[i]` still has the larger rate.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * factor ** bisect.bisect_left(decay_steps, step)


def warmup_stable_decay(
    step: int, *, total_steps: int, warmup_steps: int = 0, cooldown_steps: int, peak: float, final: float = 0.0
) -> float:
    """Linear warm-up from 0, then `peak`, then a straight line to `final` over the last `cooldown_steps` (Hu et al. 2024).

    Raises ValueError where warm-up and cool-down are longer than the run.
    """
    if warmup_steps + cooldown_steps > total_steps:
        raise ValueError(
            f"a warm-up of {warmup_steps} and a cool-down of {cooldown_steps} steps are longer than the run of {total_steps}"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    left = total_steps - step
    return peak if left >= cooldown_steps else final + (peak - final) * max(left, 0) / cooldown_steps
