"""Why a trial has no result. Only one of the reasons is a result itself: training that diverges does so each time.

    diverged     the candidate is out of its search
    lost         its process died (killed, out of memory, node gone), was stopped, or a store or device failed: run it again
    time_limit   it was not done in time, which says as much about the machine as about the candidate
    error        any other exception
    search       a final trial whose cell could not select

A search that lacks the result of a candidate selects nothing: which of the others is best would depend on an accident.
"""

from typing import Literal

from pipeline.errors import Diverged, UserError

Cause = Literal["", "diverged", "lost", "time_limit", "error", "search"]
MAX_TRIES = 3
"""Of a trial whose process is lost, in one start of a sweep."""


class TrialFailed(UserError):
    """A trial's failure, reported by another process."""

    def __init__(self, message: str, cause: Cause) -> None:
        super().__init__(message)
        self.cause = cause


def cause_of(error: BaseException) -> Cause:
    if isinstance(error, TrialFailed):
        return error.cause
    if isinstance(error, Diverged):
        return "diverged"
    return "lost" if isinstance(error, MemoryError | OSError) or _is_of_device(error) else "error"


def _is_of_device(error: BaseException) -> bool:
    """Out of a GPU's memory, or a GPU that does not answer."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)


def reason(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def is_result(cause: Cause, error: str | None) -> bool:
    """Whether a failure with this cause and message belongs to the candidate. Entries of earlier versions have no cause."""
    if cause:
        return cause == "diverged"
    return any(words in (error or "") for words in ("not finite", "not a number", " is nan", " is inf"))
