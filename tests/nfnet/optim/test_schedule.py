"""Learning rates at the corners of their schedules."""

import numpy as np
import pytest
import torch

from nfnet.optim.schedule import learning_rate, linear_scaling, step_rate, warmup_stable_decay


def test_rates_rise_from_zero_and_fall_where_the_schedule_says() -> None:
    cosine = [learning_rate(s, total_steps=6, warmup_steps=2, peak=4.0, final=2.0) for s in range(9)]
    assert cosine == pytest.approx([0, 2, 4, 3 + 2**-0.5, 3, 3 - 2**-0.5, 2, 2, 2])
    assert learning_rate(0, total_steps=3, peak=4.0) == 4.0 and learning_rate(3, total_steps=3, peak=4.0) == 0.0
    assert learning_rate(2, total_steps=2, warmup_steps=2, peak=4.0) == 4.0
    assert learning_rate(3, total_steps=3, warmup_steps=2, peak=4.0) == 0.0
    with pytest.raises(ValueError, match="longer than the run"):
        learning_rate(0, total_steps=2, warmup_steps=3, peak=1.0)
    steps = [step_rate(s, warmup_steps=2, peak=4.0, decay_steps=(4, 6), factor=0.5) for s in range(8)]
    assert steps == [0, 2, 4, 4, 4, 2, 2, 1]
    assert [step_rate(s, peak=1.0, decay_steps=(1,)) for s in range(3)] == [1.0, 1.0, 0.1]
    assert linear_scaling(0.1, 512) == 0.2


def test_warm_up_hold_and_cool_down_are_straight_lines_between_their_corners() -> None:
    found = [
        warmup_stable_decay(s, total_steps=10, warmup_steps=2, cooldown_steps=4, peak=4.0, final=2.0) for s in range(13)
    ]
    assert found == pytest.approx(np.interp(range(13), [0, 2, 6, 10], [0, 4, 4, 2]))
    whole = [warmup_stable_decay(s, total_steps=6, warmup_steps=2, cooldown_steps=4, peak=4.0) for s in range(7)]
    assert whole == pytest.approx(np.interp(range(7), [0, 2, 6], [0, 4, 0]))  # nothing is held
    assert [warmup_stable_decay(s, total_steps=3, cooldown_steps=0, peak=4.0) for s in range(3)] == [4.0] * 3
    with pytest.raises(ValueError, match="longer than the run of 5"):
        warmup_stable_decay(4, total_steps=5, warmup_steps=3, cooldown_steps=3, peak=1.0)


def test_the_cosine_is_torchs() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=4.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=7, eta_min=1.0)
    for step in range(8):
        rate = learning_rate(step + 3, total_steps=10, warmup_steps=3, peak=4.0, final=1.0)
        assert rate == pytest.approx(theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step()
