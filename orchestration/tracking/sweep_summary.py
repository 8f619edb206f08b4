"""What the parent run of a sweep says, so that nobody has to open its children: best, spread, failures, the scorecard."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transfer.report.write_report import Row
from transfer.results.statistics import Estimate

NOTE_TAG = "mlflow.note.content"  # MLflow's own name: its page of a run begins with this text
MAX_FAILURES = 20
GAP = "\u2003\u200b"  # an em space, and after it what is no space, or it would be trimmed
HEADER = ("task", "method", "images a class", "pretrained", "from scratch", "gain", "")


def trial_name(entry: Mapping[str, Any]) -> str:
    """Of the child run of a trial."""
    return "-".join(str(entry[name]) for name in ("task", "method", "init", "shots", "kind", "seed"))


def spread(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`<task>/<method>/<shots>/<init>_std`, `_min`, `_max`, `_n` over the seeds of the final trials, and how many failed."""
    groups: dict[tuple[str, str, Any, str], list[float]] = defaultdict(list)
    num_trials = num_failed = 0
    for entry in entries:
        num_trials += 1
        if entry["value"] is None:
            num_failed += 1
        elif entry["kind"] == "final":
            groups[entry["task"], entry["method"], entry["shots"], entry["init"]].append(float(entry["value"]))
    found = {"num_trials": float(num_trials), "num_failed": float(num_failed)}
    for (task, method, shots, init), values in groups.items():
        name = f"{task}/{method}/{shots}/{init}"
        found |= {f"{name}_min": min(values), f"{name}_max": max(values), f"{name}_n": float(len(values))}
        if len(values) > 1:
            found[f"{name}_std"] = statistics.stdev(values)
    return found


def tags(entries: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> dict[str, str]:
    """`best.<task>`: the best final trial and its value; `failures`: who failed and why; and the page's first text."""
    best: dict[str, Mapping[str, Any]] = {}
    failed = []
    for entry in entries:
        if entry["value"] is None:
            failed.append(f"{trial_name(entry)}: {entry['error']}")
        elif entry["kind"] == "final" and entry["value"] > best.get(entry["task"], {"value": -1.0})["value"]:
            best[entry["task"]] = entry
    found = {f"best.{task}": f"{entry['value']:.4f} {trial_name(entry)}" for task, entry in best.items()}
    if failed:
        more = f"\n... and {len(failed) - MAX_FAILURES} more" if len(failed) > MAX_FAILURES else ""
        found["failures"] = "\n".join(failed[:MAX_FAILURES]) + more
    return found | {NOTE_TAG: note(rows, found)}


def note(rows: Sequence[Row], said: Mapping[str, str]) -> str:
    """The scorecard in Markdown, then the best of each task and the failures."""
    body = []
    for row in rows:
        sides = (_percent(row.pretrained), _percent(row.scratch), _percent(row.gain, sign=True))
        failed = f", {row.num_failed} failed" if row.num_failed else ""
        cells = (row.task_title, row.method, str(row.shots), *sides, row.verdict + failed)
        body.append(cells)
    lines = table(HEADER, body)
    lines += ["", "Mean and half width of the 95 % interval over seeds; the gain is paired by seed."]
    best = [f"- {name.removeprefix('best.')}: {text}" for name, text in said.items() if name.startswith("best.")]
    lines += ["", "Best trial of each task:", *best] if best else []
    lines += ["", "Failed:", *(f"- {line}" for line in said["failures"].splitlines())] if "failures" in said else []
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table. MLflow's pages draw cells without any space between, so each brings its own."""
    cells = ([cell.replace("|", "/").replace(" ± ", "\u00a0±\u00a0") + GAP for cell in row] for row in rows)
    return ["| " + " | ".join(row) + " |" for row in ([cell + GAP for cell in header], ["---"] * len(header), *cells)]


def _percent(estimate: Estimate | None, *, sign: bool = False) -> str:
    if estimate is None:
        return "-"
    width = "" if estimate.half_width is None else f" ± {100 * estimate.half_width:.1f}"
    return f"{100 * estimate.mean:{'+' if sign else ''}.1f}{width}"
