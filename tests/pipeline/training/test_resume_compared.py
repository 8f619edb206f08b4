"""What a checkpoint says of itself against what comes of it, number by number and without a run."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint.commit import Expected
from pipeline.distributed import ALONE
from pipeline.engine.loss_window import FIRST, WINDOW
from pipeline.errors import UserError
from pipeline.records import Deviation
from pipeline.training.resume_check import ResumeCheck, digest

SAMPLES = np.array([5, 3, 9, 1])
NOISE = np.random.default_rng(0).normal(0, 0.01, 500)


def stats(loss: float = 1.0, norm: float = 2.0, *, applied: bool = True, num_lost: int = 0) -> Any:
    return SimpleNamespace(loss=loss, gradient_norm=norm, applied=applied, num_lost=num_lost)


def saved(sums: dict[str, float] | None = None) -> Expected:
    """By a run of 60 updates around loss 1 and norm 2."""
    check = ResumeCheck("never", ALONE)
    for n in range(60):
        list(check.updated(n, stats(1 + NOISE[n], 2 * math.exp(NOISE[n])), [SAMPLES]))
    return check.expected(sums or {"weights": 10.0}, SAMPLES)


def after(
    check: ResumeCheck, loss: float = 1.0, norm: float = 2.0, *, samples: Any = SAMPLES, num: int = FIRST
) -> list[Deviation]:
    found = []
    for n in range(num):
        update = stats(loss + NOISE[100 + n], norm * math.exp(NOISE[100 + n]))
        found += list(check.updated(60 + n, update, [samples[:2], samples[2:]] if n == 0 else [samples]))
    return found


def restored(stop: Any = "never", sums: dict[str, float] | None = None, *, same_data: bool = True) -> ResumeCheck:
    check = ResumeCheck(stop, ALONE)
    check.restored(60, saved(), sums or {"weights": 10.0}, same_data=same_data)
    return check


def test_a_checkpoint_holds_the_last_numbers_that_were_applied_and_no_others() -> None:
    check = ResumeCheck("never", ALONE)
    for n in range(WINDOW + 5):
        list(check.updated(n, stats(float(n), n + 0.5, applied=n % 2 == 0), [SAMPLES]))
    expected = check.expected({"weights": 1.5, "ema": math.nan, "momentum": math.inf}, SAMPLES)
    numbers = [float(n) for n in range(0, WINDOW + 5, 2)]
    assert expected["losses"] == numbers and expected["gradient_norms"] == [n + 0.5 for n in numbers]
    assert expected["sums"] == {"weights": 1.5} and expected["next_samples"] == digest(SAMPLES[::-1])
    assert len(saved()["losses"]) == len(saved()["gradient_norms"]) == WINDOW


def test_a_resumed_run_hands_the_numbers_of_before_on() -> None:
    check = restored()
    assert check.expected({"weights": 10.0}, SAMPLES) == saved()
    after(check, num=1)
    assert check.expected({}, SAMPLES)["losses"] == [*saved()["losses"][1:], 1 + NOISE[100]]
    check.restored(60, None, {}, same_data=True)  # of an earlier version: nothing is known, and nothing is compared
    assert check.expected({}, SAMPLES)["losses"] == check.expected({}, SAMPLES)["gradient_norms"] == []
    assert after(check, loss=9.0, samples=SAMPLES + 1) == []


def test_sums_of_the_state_are_equal_to_a_millionth_and_each_kind_is_named() -> None:
    assert list(restored(sums={"weights": 10.0 * (1 + 8e-7), "ema": 3.0}).judge()) == []
    for kind, word in (
        ("weights", "the weights"),
        ("momentum", "the optimiser's momentum"),
        ("momentum_buffer", "the optimiser's momentum"),
        ("exp_avg", "the optimiser's first moment"),
        ("exp_avg_sq", "the optimiser's second moment"),
        ("ema", "the averaged weights"),
        ("row_sums", "row_sums"),
    ):
        for now in ({kind: 10.0 * (1 + 1.3e-6)}, {}):
            check = ResumeCheck("never", ALONE)
            check.restored(7, saved({kind: 10.0}), now, same_data=True)
            (found,) = check.judge()
            assert (found.step, found.what, found.is_certain, found.score) == (7, "state", True, None)
            assert (
                f"other values of {word} than were saved (their sums are {now.get(kind, 0.0):.9g} and 10)" in found.text
            )
            assert list(check.judge()) == []  # said once


def test_the_samples_of_the_next_step_are_those_that_were_meant_in_whatever_order() -> None:
    assert after(restored(), samples=np.sort(SAMPLES)) == []
    (found,) = after(restored(), samples=SAMPLES + 1)
    assert (found.step, found.what, found.is_certain) == (60, "samples", True)
    assert found.text.startswith("step 60 got other samples than the checkpoint names")
    assert after(ResumeCheck("any", ALONE), samples=SAMPLES + 1) == []  # of a run from its beginning nothing is known
    assert after(restored(same_data=False), samples=SAMPLES + 1) == []
    check = restored()  # others took the place of images that were lost
    assert list(check.updated(60, stats(num_lost=1), [SAMPLES + 1])) == []
    assert list(check.updated(61, stats(), [SAMPLES + 2])) == []  # of the first step alone


@pytest.mark.parametrize(("what", "numbers"), [("losses", {"loss": 1.5}), ("gradient norms", {"norm": 4.0})])
def test_numbers_that_jump_are_a_deviation_that_may_err(what: str, numbers: dict[str, float]) -> None:
    assert after(restored()) == [] and after(restored(), **numbers, num=FIRST - 1) == []
    (found,) = after(restored("certain"), **numbers)
    assert (found.step, found.what, found.is_certain) == (60 + FIRST - 1, what, False)
    assert found.score is not None and found.score > 10
    level, before = {"losses": ("1.501", "1.006"), "gradient norms": ("4.004", "2.013")}[what]
    assert f"first {FIRST} {what} is {level}, where those before the checkpoint let {before} be expected" in found.text
    assert [one.text for one in after(restored(), **numbers, num=3 * FIRST)] == [found.text]  # compared once


def test_small_norms_are_compared_too_and_a_short_window_says_nothing() -> None:
    before = saved()
    before["gradient_norms"] = [norm / 2000 for norm in before["gradient_norms"]]
    for norm, found in ((1e-3, []), (2e-3, ["gradient norms"])):
        check = ResumeCheck("never", ALONE)
        check.restored(60, before, {"weights": 10.0}, same_data=True)
        assert [one.what for one in after(check, norm=norm)] == found
    short = ResumeCheck("any", ALONE)
    short.restored(60, {**saved(), "losses": [1.0], "gradient_norms": [2.0]}, {"weights": 10.0}, same_data=True)
    assert after(short, loss=9.0, norm=99.0) == []


def test_updates_that_were_left_out_count_for_nothing() -> None:
    check = restored()
    for n in range(FIRST):
        assert list(check.updated(60 + n, stats(9.0, 99.0, applied=False), [SAMPLES])) == []
    assert after(check) == []


@pytest.mark.parametrize(
    ("stop", "ends"), [("never", (False, False)), ("certain", (True, False)), ("any", (True, True))]
)
def test_what_ends_the_run_is_configured(stop: str, ends: tuple[bool, bool]) -> None:
    for end, go_on in zip(
        ends, (lambda: after(restored(stop), samples=SAMPLES + 1), lambda: after(restored(stop), loss=1.5)), strict=True
    ):
        if end:
            with pytest.raises(
                UserError, match=r"does not go on as it was saved: .*set saving\.stop_after_resume to never"
            ):
                go_on()
        else:
            assert len(go_on()) == 1


def test_a_digest_of_samples_is_part_of_the_format_of_a_checkpoint() -> None:
    assert digest(np.array([3, 1, 2], np.int32)) == digest(np.array([1, 2, 3])) == "e2e2033ae7e19d680599d4eb0a1359a2"
