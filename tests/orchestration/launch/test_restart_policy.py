"""What follows from how ranks ended: pure functions."""

import signal

import pytest

from orchestration.launch.restart_policy import (
    LONGEST_PAUSE_S,
    Failure,
    HostReport,
    RestartLimits,
    Verdict,
    judge,
    limited,
    outcome,
)

LIMITS = RestartLimits(max_restarts=3, window_s=3600, min_hosts=1)
HOSTS = ["a", "b"]


def report(host: str, *codes: int, is_stopped: bool = False) -> HostReport:
    return HostReport(host=host, codes=codes, is_stopped=is_stopped, has_main=host == "a")


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([-signal.SIGTERM, 75], 75),  # told before it could listen
        ([75, 2], 2),
        ([1, 2], 2),  # the other rank misses the one that has left
        ([-signal.SIGKILL, 1], 1),
        ([-signal.SIGSEGV], 1),
        ([-41, 76], 76),  # the frozen one, drawn out by a neighbour, ends first
        ([1, 76], 76),
        ([3], 3),
    ],
)
def test_the_code_of_a_run_is_that_of_the_rank_that_explains_it(codes: list[int], code: int) -> None:
    assert outcome(codes) == code


@pytest.mark.parametrize(
    ("reports", "is_growing", "goes_on", "code"),
    [
        ([report("a", 0), report("b", 0)], False, False, 0),
        ([report("a", 0)], False, False, 0),  # rank 0 writes last: where it is done, all is
        ([report("b", 0)], False, True, 1),
        ([report("a", 2), report("b", 1)], False, False, 2),
        ([report("a", 75, is_stopped=True), report("b", 75)], False, False, 75),
        ([report("a", 75), report("b", 75)], False, False, 75),  # the ranks themselves gave up
        ([report("a", 75)], True, True, 75),  # b's ranks were told so that a host can join
        ([report("a", 75)], False, True, 1),  # b's agent was killed, and its ranks told the others
        ([report("a", 1), report("b", 1)], False, True, 1),
        ([report("a", 76), report("b", 76)], False, True, 76),
        ([report("a", 1, is_stopped=True), report("b", 75)], False, False, 1),  # a stop that failed is no restart
    ],
)
def test_a_verdict_ends_the_job_or_starts_it_again(
    reports: list[HostReport], is_growing: bool, goes_on: bool, code: int
) -> None:
    verdict = judge(reports, HOSTS, is_growing=is_growing)
    assert (verdict.goes_on, verdict.code) == (goes_on, code)


def test_only_failures_count() -> None:
    assert not judge([report("a", 75)], HOSTS, is_growing=True).is_failure
    assert judge([report("a", 75)], HOSTS, is_growing=False).is_failure


@pytest.mark.parametrize(
    ("reports", "blamed"),
    [
        ([report("a", 1), report("b", -signal.SIGKILL)], ("b",)),
        ([report("a", 1)], ("b",)),
        ([report("a", -signal.SIGKILL)], ("a",)),  # b has not left yet
        ([report("a", 76), report("b", -41)], ("b",)),
        ([report("a", 1), report("b", 1)], ()),
    ],
)
def test_the_host_is_to_blame_whose_ranks_were_killed_or_that_is_gone(
    reports: list[HostReport], blamed: tuple[str, ...]
) -> None:
    assert judge(reports, HOSTS, is_growing=False).blamed == blamed


def fail(times: int, blamed: tuple[str, ...], *, apart_s: float, min_hosts: int = 1) -> list[Verdict]:
    failed = Verdict(goes_on=True, code=1, blamed=blamed, is_failure=True)
    limits = RestartLimits(max_restarts=3, window_s=3600, min_hosts=min_hosts)
    earlier: list[Failure] = []
    verdicts = []
    for i in range(times):
        verdict, earlier = limited(failed, earlier, now_s=i * apart_s, hosts=HOSTS, limits=limits)
        verdicts.append(verdict)
    return verdicts


def test_restarts_within_the_window_are_limited_and_their_pauses_grow() -> None:
    verdicts = fail(4, (), apart_s=60)
    assert [v.goes_on for v in verdicts] == [True, True, True, False]
    assert [v.pause_s for v in verdicts[:3]] == [1, 2, 4]


def test_failures_that_lie_far_apart_are_all_followed_by_a_restart() -> None:
    verdicts = fail(50, (), apart_s=1300)
    assert all(v.goes_on for v in verdicts) and max(v.pause_s for v in verdicts) <= 4


def test_no_pause_is_longer_than_the_longest() -> None:
    many = RestartLimits(max_restarts=100, window_s=3600, min_hosts=1)
    earlier = [Failure(time_s=0, hosts=(), code=1)] * 60
    verdict, _ = limited(Verdict(goes_on=True, code=1, is_failure=True), earlier, now_s=1, hosts=HOSTS, limits=many)
    assert verdict.pause_s == LONGEST_PAUSE_S


def test_a_host_that_alone_fails_again_and_again_is_left_out_if_enough_others_are_there() -> None:
    *before, last = fail(4, ("b",), apart_s=60)
    assert all(v.goes_on and not v.left_out for v in before)
    assert last.goes_on and last.left_out == "b"
    assert not fail(4, ("b",), apart_s=60, min_hosts=2)[-1].goes_on


def test_without_restarts_nobody_is_left_out() -> None:
    never = RestartLimits(max_restarts=0, window_s=3600, min_hosts=1)
    failed = Verdict(goes_on=True, code=1, blamed=("b",), is_failure=True)
    verdict, _ = limited(failed, [], now_s=0, hosts=HOSTS, limits=never)
    assert (verdict.goes_on, verdict.left_out) == (False, "")
