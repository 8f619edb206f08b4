"""The small search of fine-tuning: learning rate x schedule length, the same for both inits.

A from-scratch network wants higher rates and longer schedules than a pretrained one; a space that serves only the
latter would make pretraining look better than it is, so the space is one, and each init picks its own point in it.
"""

from __future__ import annotations

from transfer.tasks import FinetuneSettings

REDUCTION = 2
"""ASHA keeps the better half at a rung."""


def candidates(settings: FinetuneSettings) -> list[dict[str, float | int]]:
    """All points of the space, long schedules and middle rates first: they are the ones that others are measured by."""
    middle = len(settings.learning_rates) / 2
    rates = sorted(settings.learning_rates, key=lambda r: abs(settings.learning_rates.index(r) + 0.5 - middle))
    return [{"learning_rate": r, "num_steps": s} for s in sorted(settings.num_steps, reverse=True) for r in rates]


def grace_steps(settings: FinetuneSettings) -> int:
    """Steps before the first rung, and between evaluations on the held-out part: half of the shortest schedule."""
    return max(1, min(settings.num_steps) // 2)
