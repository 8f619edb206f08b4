"""What agents tell each other through the store."""

from collections.abc import Callable

import pytest
from torch.distributed import HashStore

from orchestration.launch.job_store import AttemptRecord, JobRecord
from orchestration.launch.restart_policy import LONGEST_PAUSE_S, Failure, HostReport, Verdict
from pipeline.errors import UserError


def test_the_first_verdict_holds_and_one_host_is_its_author() -> None:
    store = HashStore()
    first, second = (AttemptRecord(store, group_rank=rank, num_hosts=2) for rank in (0, 1))
    verdict = Verdict(goes_on=True, code=1, blamed=("b",), is_failure=True, pause_s=2.0)
    assert first.agree(verdict) == (verdict, True)
    assert second.agree(verdict) == (verdict, False)  # though it found the same
    assert second.agree(Verdict(goes_on=False, code=0)) == (verdict, False)


def test_reports_and_names_of_hosts_come_back_as_they_were_written() -> None:
    store = HashStore()
    first, second = (AttemptRecord(store, group_rank=rank, num_hosts=2) for rank in (0, 1))
    first.join("a")
    second.join("b")
    assert first.hosts() == ["a", "b"]
    report = HostReport(host="b", codes=(-9, 75), is_stopped=False, has_main=False)
    second.report(report)
    assert first.reports(0.0, lambda: False) == [report]  # a has not written one


def test_a_job_ends_with_the_first_code_and_remembers_failures_and_who_is_left_out() -> None:
    job = JobRecord(HashStore())
    assert job.ended is None and job.failures == [] and not job.is_left_out("b")
    failures = [Failure(time_s=1.0, hosts=("b",), code=76)]
    job.failures = failures
    job.leave_out("b")
    assert (job.failures, job.is_left_out("b"), job.is_left_out("a")) == (failures, True, False)
    assert (job.end(75), job.end(0), job.ended) == (75, 75, 75)


READS: dict[str, Callable[[HashStore], object]] = {
    "ended": lambda store: JobRecord(store).ended,
    "failures": lambda store: JobRecord(store).failures,
    "normfree/host/0": lambda store: AttemptRecord(store, group_rank=0, num_hosts=1).hosts(),
    "normfree/report/0": lambda store: AttemptRecord(store, group_rank=0, num_hosts=1).reports(0.0, lambda: True),
    "normfree/verdict": lambda store: AttemptRecord(store, group_rank=0, num_hosts=1).agree(
        Verdict(goes_on=True, code=0)
    ),
}


@pytest.mark.parametrize("key", READS)
@pytest.mark.parametrize(
    "hostile", ["x", "[" * 9000, "{}", "9" * 5000, '{"verdict": {"goes_on": 1, "code": 0}, "by": 0}']
)
def test_what_anybody_may_have_written_is_a_document_or_refused(key: str, hostile: str) -> None:
    store = HashStore()
    store.set(key, hostile)
    with pytest.raises(UserError, match="the job's store"):
        READS[key](store)


def test_no_verdict_makes_an_agent_wait_for_ever() -> None:
    store = HashStore()
    first, second = (AttemptRecord(store, group_rank=rank, num_hosts=2) for rank in (0, 1))
    first.agree(Verdict(goes_on=True, code=1, pause_s=1e18))
    assert second.agree(Verdict(goes_on=False, code=0))[0].pause_s == LONGEST_PAUSE_S
