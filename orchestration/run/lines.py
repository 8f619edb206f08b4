"""A run's plan and its updates as lines of text."""

import math

from pipeline.records import Started, Step

HEAD_BIAS = "the head's bias"


def plan_lines(started: Started) -> list[tuple[str, str]]:
    """What will happen, in numbers, as (name, text)."""
    dropped = "none is dropped"
    if started.dropped_samples:
        dropped = (
            f"{started.dropped_samples:,} of the last epoch are dropped, because the run ends before it is whole "
            "(every whole epoch uses each image once)"
        )
    return [
        ("run", f"{started.run_name} in {started.run_dir}"),
        ("from", f"step {started.step:,}, {started.resumed_from or 'its initial weights'}"),
        ("model", f"{started.num_parameters:,} parameters in {started.precision}"),
        ("passes", started.passes),
        ("data", f"{started.samples_per_epoch:,} images an epoch, {started.steps_per_epoch:,.2f} steps; {dropped}"),
        *(("", line) for line in started.data_plan),
        ("length", f"{started.total_steps:,} steps, {started.total_samples:,} images"),
        (
            "batch",
            f"{started.global_batch} = {started.num_ranks} {'process' if started.num_ranks == 1 else 'processes'}"
            f" x {started.micro_batch} images x {started.accumulation} accumulated",
        ),
        ("machine", f"{started.device}, ZeRO stage {started.zero_stage}{_rate(started)}"),
        ("digests", f"configuration {started.config_digest[:12]}, data {started.dataset_digest[:12]}"),
    ]


def _rate(started: Started) -> str:
    if not started.device_flops:
        return ""
    rate, unit = (
        (started.device_flops / 1e12, "T") if started.device_flops >= 1e12 else (started.device_flops / 1e9, "G")
    )
    return f"; {rate:.3g} {unit}FLOP/s in products of matrices ({started.precision}, each process)"


def step_line(step: Step, started: Started | None, left_s: float) -> str:
    """One line about the updates since the last one; `left_s` until the end of the run."""
    total = f"/{started.total_steps}" if started else ""
    waits = step.data_wait_s / step.step_s if step.step_s > 0 else 0.0
    return (
        f"step {step.step}{total}  left {duration(left_s)}  loss {step.loss:.4f}  acc {step.accuracy:.1%}  "
        f"{step.images_per_s:,.0f} img/s{_share(step)}  clipped {step.clipped_share:.0%}{_most(step)}  data wait {waits:.0%}"
        f"{_breakdown(step)}"
    )


def _share(step: Step) -> str:
    if step.flops_share is None:
        return ""
    if step.flops_share > 1:  # no share at all: other programs had the device when its rate was measured
        return " (above the matrix rate at the start)"
    return f" ({step.flops_share:.0%} of the matrix rate)"


def _most(step: Step) -> str:
    """The part of the network that is clipped most, where it is clipped more than the whole, and the one that moves most."""
    text = ""
    clipped, part = max(
        ((numbers["clipped_share"] or 0.0, name) for name, numbers in step.parts.items()), default=(0, "")
    )
    if f"{clipped:.0%}" != f"{step.clipped_share:.0%}" and clipped > step.clipped_share:
        # The classifier's weight is never clipped: what is clipped of the head is its bias alone.
        text = f" ({HEAD_BIAS if part == 'head' else part} {clipped:.0%})"
    moves = [
        (ratio, name) for name, numbers in step.parts.items() if math.isfinite(ratio := numbers["update_ratio"] or 0.0)
    ]
    ratio, part = max(moves, default=(0.0, ""))
    if ratio:
        text += f"  moved at most {ratio:.2%} ({part})"
    return text


def _breakdown(step: Step) -> str:
    """Where the rest of the wall time since the last line went; what is below one in a hundred is skipped."""
    if not step.wall_s > 0:
        return ""
    named = ("transfer", "compute", "save", "log", "evaluate", "other")
    shares = {name: getattr(step, f"{name}_s") / step.wall_s for name in named}
    return "".join(f"  {name} {share:.0%}" for name, share in shares.items() if share >= 0.01)


def duration(seconds_s: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min, 3 d 04 h."""
    if not seconds_s < 1e9:  # infinite, or no number yet
        return "?"
    if seconds_s < 60:
        return f"{seconds_s:.1f} s" if seconds_s < 10 else f"{seconds_s:.0f} s"
    for unit_s, name, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds_s >= unit_s:
            return f"{int(seconds_s // unit_s)} {name} {int(seconds_s % unit_s // part_s):02d} {part}"
    raise AssertionError("unreachable")


def size(num_bytes: float) -> str:
    """12.3 MB, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
