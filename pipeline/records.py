"""What a run says about itself: plain values, yielded by `pipeline.training.train.train`, read by whoever cares.

The console, the tracker's spool and the sweep are readers; the loop knows none of them. Every record turns into one flat
JSON object (`as_dict`) whose `kind` names its class and whose `time_s` is the Unix time of its creation, so that a spool
of them can be replayed later with the original times.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records."""

    step: int
    """Number of updates applied so far."""
    time_s: float = field(default_factory=time.time)

    def as_dict(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Phase(Record):
    """The run enters a named phase ("starting the engine", "training", "evaluating", ...)."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Started(Record):
    """Printed before step 0: what will happen, in numbers that the end of the run must match."""

    run_name: str
    run_dir: str
    total_steps: int
    total_samples: int
    samples_per_epoch: int
    steps_per_epoch: float
    dropped_samples: int
    """Samples of the last, partial epoch that no step reaches; every full epoch uses each sample once."""
    global_batch: int
    micro_batch: int
    accumulation: int
    num_ranks: int
    num_parameters: int
    device: str
    zero_stage: int
    precision: str
    passes: str = "eager"
    """How forward and backward passes run, in words: eagerly, or compiled, with numbers of graphs and seconds."""
    resumed_from: str | None
    """URL of the checkpoint that was loaded, None when the run starts from its initial weights."""
    config: dict[str, Any]
    config_digest: str
    dataset_digest: str
    data_plan: tuple[str, ...] = ()
    """What will become of the samples, in sentences: what is repeated, dropped or skipped, and why."""
    image_flops: float = 0.0
    """Floating-point operations of a forward and a backward pass of one image, without what is computed again: six for each
    multiply-add of the forward pass. 0 = they cannot be counted."""
    device_flops: float = 0.0
    """Operations a second of this rank's device in products of matrices, measured just now (`nfnet.analysis.matrix_rate`)."""


@dataclass(frozen=True, kw_only=True)
class Changed(Record):
    """What this start of a run does otherwise than the one before, and may: its length, code, versions, place of its data."""

    what: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Notice(Record):
    """Something that went another way than asked and does no harm to the numbers; reported once."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Deviation(Record):
    """The run does not go on as it was saved (`pipeline.training.resume_check`)."""

    what: str
    """state, samples, losses, gradient norms"""
    text: str
    is_certain: bool
    """A comparison that cannot err; else a statistical one, whose `score` is above its limit."""
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class PassedOver(Record):
    """A checkpoint that does not verify: kept where it is, not used."""

    url: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Step(Record):
    """Means over the updates since the last Step record (`num_updates` of them), over all ranks."""

    num_updates: int
    samples: int
    """Samples consumed since the start of the run."""
    epoch: float
    loss: float
    accuracy: float
    """Top-1 share on the training batches, augmented, before the update."""
    learning_rate: float
    clipped_share: float
    """Units whose gradient AGC scaled down, as a share of the units that it looked at."""
    gradient_norm: float
    """Norm of the whole gradient after clipping."""
    parts: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """Of each part of the network (stem, stage 0, ..., final, head): clipped_share as above; gradient_norm, weight_norm and
    update_ratio (norm of the weights' change over their norm) of the last update, None where that was skipped."""
    images_per_s: float
    flops_share: float | None = None
    """Of `Started.device_flops`, what the network's own arithmetic takes on each rank's device: MFU."""
    data_wait_s: float
    """Seconds per update, as the next five, which add up to `wall_s`: waiting for a batch;"""
    transfer_s: float = 0.0
    """handing it to the device;"""
    compute_s: float = 0.0
    """forward, backward, agreement over the ranks, update (`pipeline.supervision.phase_clock` says how a GPU's time is taken);"""
    save_s: float = 0.0
    log_s: float = 0.0
    """whoever reads these records;"""
    evaluate_s: float = 0.0
    other_s: float = 0.0
    """and what none of these is."""
    wall_s: float = 0.0
    """Wall seconds per update since the last Step record, everything included."""
    step_s: float
    """Wall seconds per update without evaluation and saving: what the rate and the time that remains are computed from."""
    remaining_s: float


@dataclass(frozen=True, kw_only=True)
class Lost(Record):
    """Samples that a step should have used and could not read, on all ranks; others of their batch took their places."""

    samples: tuple[dict[str, Any], ...]
    """Each with shard, key, reason, filled_with, epoch, source."""
    num_epoch: int
    """Lost since the epoch began."""
    num_allowed: int
    """What the budget allows in an epoch; one more stops the run."""


@dataclass(frozen=True, kw_only=True)
class Accounted(Record):
    """What became of the samples of one pass (`epoch`), or of all passes so far (`epoch` None): they add up.

    manifest = used + skipped + dropped + excluded, of different samples in each pass; `repeated` are images beyond that.
    """

    source: str
    epoch: int | None
    manifest: int
    used: int
    skipped: int
    dropped: int
    excluded: int
    repeated: int


@dataclass(frozen=True, kw_only=True)
class Skipped(Record):
    """An update that all ranks skipped together because a loss or gradient was not finite."""

    reason: str
    samples: int
    keys: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RolledBack(Record):
    """After updates in a row that were not finite: the run goes on from a checkpoint, without their data. `step` is its step."""

    from_step: int
    """Steps that were done; those after `step` are done again."""
    checkpoint: str
    reason: str
    keys: tuple[str, ...]
    """Samples that are skipped from now on."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    split: str
    weights: str
    """"ema" or "raw": which weights were evaluated."""
    loss: float
    top1: float
    top5: float
    num_samples: int
    seconds_s: float


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """Of a phase or an operation: milliseconds a step, and the share of all; of a device nothing where there is none."""

    name: str
    host_ms: float
    host_share: float
    device_ms: float = 0.0
    device_share: float = 0.0
    calls: float = 0.0
    """A step."""


@dataclass(frozen=True, kw_only=True)
class Profiled(Record):
    """Steps `first` to `last` of this attempt were looked at closely, on the main rank, which alone yields this."""

    first: int
    last: int
    url: str
    """Of the trace; "" where it was too large to keep."""
    size_bytes: int
    step_ms: float
    """Of a profiled step, which takes longer than others."""
    phases: tuple[ProfileRow, ...]
    """Where a step's time goes, from its begin to its end."""
    operations: tuple[ProfileRow, ...]
    """The ten that take most time by themselves."""


@dataclass(frozen=True, kw_only=True)
class Saved(Record):
    """A checkpoint was committed. `step` is its own, which lies before that of the records around it."""

    url: str
    digest: str
    """SHA-256 of the commit file."""
    size_bytes: int
    seconds_s: float
    """From the copy's begin to the commit, alongside training."""
    stalled_s: float = 0.0
    """Training stood still for this long: the wait for the save before, and the copy to host memory."""
    waited_s: float = 0.0
    """The part of it that was the wait for the save before (back-pressure)."""
    num_missed: int = 0
    """Saves that failed or were skipped since the last one that stood."""
    note: str = ""
    """What is unusual: written next to a damaged checkpoint, old ones could not be deleted."""


@dataclass(frozen=True, kw_only=True)
class SaveFailed(Record):
    """A checkpoint could not be written; training goes on, and the next interval tries again."""

    url: str
    reason: str
    num_missed: int
    """Saves that failed or were skipped since the last one that stood, this one included."""


@dataclass(frozen=True, kw_only=True)
class SaveSkipped(Record):
    """A save was skipped because the one before was still being written after the set time."""

    reason: str
    waited_s: float
    num_missed: int
    """As in SaveFailed."""


@dataclass(frozen=True, kw_only=True)
class Finished(Record):
    """Last record of a run that did all its steps."""

    checkpoint: str | None
    samples: int
    """Consumed since the last (re)start."""
    seconds_s: float
    evaluation: dict[str, float]
    """loss, top1, top5 of the last evaluation; empty when the run has no evaluation split."""


@dataclass(frozen=True, kw_only=True)
class Stopped(Record):
    """Last record of a run that was asked to stop (SIGTERM): saved, to be resumed by the same command."""

    checkpoint: str | None
    reason: str
