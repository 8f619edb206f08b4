"""How checkpoints of a run are written and which of them stay."""

from dataclasses import dataclass
from typing import Literal

from pipeline.configuration import check_fields
from pipeline.field_types import CountOrZero, PositiveDuration, Seconds

StopAfterResume = Literal["certain", "any", "never"]


@dataclass(frozen=True, kw_only=True)
class SavingConfig:
    """How checkpoints are written and which of them stay; nothing here decides a number of the run."""

    in_background: bool = True
    """False: training waits until the checkpoint is committed."""
    max_wait_s: Seconds = 60.0
    """A save that finds the one before still being written waits for it for this long, then is skipped and counted."""
    staging: str = ""
    """Local folder where files wait for their upload to a store that is not S3 (S3 takes them from memory); "" = the system's
    temporary folder."""
    keep_every: PositiveDuration | None = None
    """Checkpoints at multiples of this stay, besides the newest `keep_checkpoints`."""
    keep_best: CountOrZero = 0
    """This many best ones by `best_metric` stay, besides the newest."""
    best_metric: Literal["top1", "top5", "loss"] = "top1"
    """Of the last evaluation before the save."""
    stop_after_resume: StopAfterResume = "certain"
    """What ends a resumed run that does not go on as it was saved: certain = state or samples that are not the checkpoint's;
    any = also first losses or gradient norms that deviate from those before it; never = nothing. All of it is reported."""

    def __post_init__(self) -> None:
        check_fields(self, "saving")
