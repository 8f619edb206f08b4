"""Learning rates at the corners of their schedules."""

import pytest

from nfnet.optim.schedule import learning_rate, linear_scaling, step_rate


def test_rates_rise_from_zero_and_fall_where_the_schedule_says() -> None:
    cosine = [learning_rate(s, total_steps=6, warmup_steps=2, peak=4.0, final=2.0) for s in range(9)]
    assert cosine == pytest.approx([0, 2, 4, 3 + 2**-0.5, 3, 3 - 2**-0.5, 2, 2, 2])
    assert learning_rate(0, total_steps=3, peak=4.0) == 4.0 and learning_rate(3, total_steps=3, peak=4.0) == 0.0
    assert learning_rate(2, total_steps=2, warmup_steps=2, peak=4.0) == 4.0
    with pytest.raises(ValueError, match="longer than the run"):
        learning_rate(0, total_steps=2, warmup_steps=3, peak=1.0)
    steps = [step_rate(s, warmup_steps=2, peak=4.0, decay_steps=(4, 6), factor=0.5) for s in range(8)]
    assert steps == [0, 2, 4, 4, 4, 2, 2, 1]
    assert [step_rate(s, peak=1.0, decay_steps=(1,)) for s in range(3)] == [1.0, 1.0, 0.1]
    assert linear_scaling(0.1, 512) == 0.2
