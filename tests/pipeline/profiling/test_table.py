"""A profile's events by hand: to whom each moment and each kernel belongs."""

import pytest

from pipeline.errors import UserError
from pipeline.profiling.asked import parse
from pipeline.profiling.table import Event, lines, operations, phases


def test_each_moment_belongs_to_the_innermost_phase_and_each_kernel_to_who_started_it() -> None:
    events = [
        Event(name="kernel too early", begin_us=-1, end_us=0, device_us=4),
        Event(name="f", begin_us=0, end_us=10, phase="forward"),
        Event(name="conv", begin_us=1, end_us=9, self_us=8, device_us=30),
        Event(name="b", begin_us=10, end_us=40, phase="backward"),
        Event(name="grad", begin_us=12, end_us=20, self_us=8, device_us=50),  # of autograd's thread
        Event(name="r", begin_us=20, end_us=25, phase="reduce"),
        Event(name="all_reduce", begin_us=21, end_us=24, self_us=3, device_us=16),
        Event(name="r", begin_us=30, end_us=35, phase="reduce"),
    ]
    found = {r.name: r for r in phases(events, num_steps=2, wall_us=50)}
    assert {n: r.host_share for n, r in found.items()} == {
        "forward": 0.2,
        "backward": 0.4,
        "reduce": 0.2,
        "other": 0.2,
    }
    assert {n: r.device_share for n, r in found.items()} == {
        "forward": 0.3,
        "backward": 0.5,
        "reduce": 0.16,
        "other": 0.04,
    }
    assert found["reduce"].calls == 1 and found["forward"].host_ms == 0.005
    assert [r.name for r in operations(events, num_steps=2)] == ["grad", "conv", "all_reduce", "kernel too early"]
    assert "device ms" in lines("phase", list(found.values()))[0]


@pytest.mark.parametrize("text", ["13:10", "0:3", ":", "a", "1:", "-1", "1:60", "51", "2:3:4", "0", "1.5", "³"])
def test_a_bad_range_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"--profile .*; (write|give) [^\n]*$"):
        parse(text)


def test_which_steps_are_meant() -> None:
    whole, number = parse("10:13"), parse("2")
    assert whole is not None and number is not None and parse("") is None
    assert list(whole.of_run(0)) == [10, 11, 12, 13] and list(whole.of_run(11)) == [12, 13] and not whole.of_run(13)
    assert list(number.of_run(100)) == [104, 105]
    for steps, total in ((whole, 13), (number, 5)):
        steps.check(total)
        with pytest.raises(UserError, match=f"the run has {total - 1}"):
            steps.check(total - 1)
