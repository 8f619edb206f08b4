"""A status as text: a block for one run or sweep, a line each for many."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from orchestration.operations.status import RunStatus
from orchestration.run.lines import duration, size

if TYPE_CHECKING:
    from orchestration.operations.sweep_status import SweepStatus

STATES = {
    "running": "running",
    "starting": "starting",
    "finished": "finished",
    "stopped": "stopped by a signal",
    "failed": "failed",
    "hang": "ended because a rank froze",
    "gone": "dead: it ended without a last word",
    "new": "has not begun",
    "unfinished": "not running, and not all trials are done",
}
MAX_STARTS = 10
MAX_FAILURES = 10
MAX_RUNNING = 4


def block(status: RunStatus | SweepStatus) -> list[str]:
    rows = _run(status) if isinstance(status, RunStatus) else _sweep(status)
    rows += [("MLflow", status.mlflow), *(("note", note) for note in status.notes), ("go on", status.resume_command)]
    return [f"{name:>10}  {text}" for name, text in rows if text]


def _alive(status: RunStatus | SweepStatus) -> str:
    owner = status.owner
    if owner is None:
        return "nobody: its folder has no owner"
    since = datetime.fromtimestamp(owner["since_s"]).strftime("%Y-%m-%d %H:%M:%S")
    beat = f"last sign of life {duration(owner['beat_age_s'])} ago"
    head = "" if status.is_alive else "nobody; the last owner was "
    return f"{head}process {owner['pid']} on {owner['host']} since {since}, {beat}"


def _run(status: RunStatus) -> list[tuple[str, str]]:
    rows = [("run", f"{status.name} in {status.url}"), ("state", STATES[status.state]), ("works on it", _alive(status))]
    of = f" of {status.total_steps:,} ({status.step / status.total_steps:.0%})" if status.total_steps else ""
    speed = "" if status.images_per_s is None else f", {status.images_per_s:,.0f} images/s"
    left = "" if status.left_s is None else f", {duration(status.left_s)} left"
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    rows.append(("step", f"{status.step:,}{of}{speed}{left}{loss}"))
    if status.evaluation:
        rows.append(
            (
                "result",
                ", ".join(f"{n} {v:.2%}" if n != "loss" else f"loss {v:.4f}" for n, v in status.evaluation.items()),
            )
        )
    rows += _checkpoint(status)
    rows += _starts(status)
    if status.troubles:
        counts = ", ".join(f"{n} {kind}" for kind, n in status.troubles.items())
        rows.append(("troubles", f"{counts}; last: {status.last_trouble}"))
    return [*rows, ("first error", status.first_error)]


def _checkpoint(status: RunStatus) -> list[tuple[str, str]]:
    saved = status.checkpoint
    if saved is None:
        return [
            (
                "checkpoint",
                f"none that stands, of {status.num_checkpoints} folders" if status.num_checkpoints else "none yet",
            )
        ]
    age = "" if saved.age_s is None else f", {duration(saved.age_s)} old"
    proof = {
        "sizes": "commit file and sizes are right (--verify reads all bytes)",
        "bytes": "all bytes verify",
    }[saved.verified]
    return [
        ("checkpoint", f"step {saved.step:,}{age}, {size(saved.size_bytes)}: {proof}"),
        ("", saved.url),
        *(("passed over", text) for text in saved.passed_over),
    ]


def _starts(status: RunStatus) -> list[tuple[str, str]]:
    rows = []
    shown = status.starts[-MAX_STARTS:]
    if len(status.starts) > len(shown):
        rows.append(("starts", f"{len(status.starts)}, of which the last {MAX_STARTS}:"))
    for start in shown:
        when = datetime.fromtimestamp(start.time_s).strftime("%Y-%m-%d %H:%M:%S")
        at = "" if start.step is None else f" from step {start.step:,}"
        why = f": {start.why}" if start.why else ""
        rows.append((f"start {start.number}", f"{when} on {start.host}{at}, {start.ending}{why}"))
    return rows


def _sweep(status: SweepStatus) -> list[tuple[str, str]]:
    of = f" of {status.num_trials:,}" if status.num_trials else ""
    left = "" if status.left_s is None else f", about {duration(status.left_s)} left"
    failures = [("failed", text) for text in status.failures[:MAX_FAILURES]]
    more = len(status.failures) - len(failures)
    return [
        ("sweep", f"{status.name} in {status.url}"),
        ("state", STATES[status.state]),
        ("works on it", _alive(status)),
        ("trials", f"{status.num_done:,}{of} are over, {status.num_failed} of them failed{left}"),
        ("running", f"{len(status.running)}: {', '.join(status.running[:MAX_RUNNING])}" if status.running else ""),
        *failures,
        ("", f"and {more} more" if more > 0 else ""),
        *(("best", f"{task}: {text}") for task, text in status.best.items()),
    ]


def line(status: RunStatus | SweepStatus) -> str:
    """One of many."""
    if not isinstance(status, RunStatus):
        of = f"/{status.num_trials}" if status.num_trials else ""
        return f"{status.state:<10}  trials {status.num_done}{of}  {status.url}"
    of = f"/{status.total_steps}" if status.total_steps else ""
    saved = f"saved {status.checkpoint.step}" if status.checkpoint else "nothing saved"
    top1 = f"  top-1 {status.evaluation['top1']:.1%}" if "top1" in status.evaluation else ""
    starts = f"  {len(status.starts)} starts" if len(status.starts) > 1 else ""
    return f"{status.state:<10}  step {status.step}{of}  {saved}{top1}{starts}  {status.url}"
