"""The parent run of a sweep sums up its children: best, spread, failures, and the scorecard in Markdown."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from orchestration.tracking.upload import TAG_CHARACTERS
from pipeline.display import markdown
from transfer.results.scorecard import Row, shots_text
from transfer.results.scorecard_table import columns_of, lines_of, notes

NOTE_TAG = "mlflow.note.content"  # MLflow's own name: its page of a run begins with this text
MAX_FAILURES = 20
GAP = "\u2003\u200b"  # an em space, and after it what is no space, or it would be trimmed


def trial_name(entry: Mapping[str, Any], *, several_sources: bool = False) -> str:
    """Of the child run of a trial, short enough for a column of MLflow's pages: "final 0 digits ridge 5 pretrained".

    A cell has one final trial a seed, and many of a search with one seed, which their digests tell apart.

    Args:
        several_sources: the source is named in place of "pretrained".
    """
    number = entry["seed"] if entry["kind"] == "final" else str(entry["digest"])[:6]
    start = str(entry["backbone"]) if several_sources and entry["init"] == "pretrained" else _start(entry)
    words = entry["kind"], number, entry["task"], entry["method"], shots_text(int(entry["shots"])), start
    return " ".join(map(str, words)).replace("=", " ")


def _start(entry: Mapping[str, Any]) -> str:
    """pretrained or scratch; of networks that are compared without weights, the network, in characters that MLflow takes."""
    is_own = entry["init"] == "scratch" and entry["backbone"] not in ("", entry["model"])
    return str(entry["backbone"]).replace("=", " ") if is_own else str(entry["init"])


def spread(entries: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`<task>/<method>/<shots>/<init>_std`, `_min`, `_max`, `_n` over the seeds of the final trials, and how many failed."""
    groups: dict[tuple[str, str, Any, str], list[float]] = defaultdict(list)
    num_trials = num_failed = 0
    for entry in entries:
        num_trials += 1
        if entry["value"] is None:
            num_failed += 1
        elif entry["kind"] == "final":
            groups[entry["task"], entry["method"], entry["shots"], _start(entry)].append(float(entry["value"]))
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


def note(rows: Sequence[Row], tags: Mapping[str, str]) -> str:
    """The scorecard in Markdown, then the best of each task and the failures; by whole lines as long as a tag may be."""
    lines = scorecard_table(rows)
    lines += ["", *(f"- {markdown(text)}" for text in notes(rows))]
    best = {name.removeprefix("best."): text for name, text in tags.items() if name.startswith("best.")}
    if best:
        lines += [
            "",
            "Best trial of each task:",
            *(f"- {markdown(task)}: {markdown(text)}" for task, text in best.items()),
        ]
    if "failures" in tags:
        lines += ["", "Failed:", *(f"- {markdown(line)}" for line in tags["failures"].split("\n"))]
    return fitting(
        lines,
        TAG_CHARACTERS,
        lambda num: f"{num} more {'line is' if num == 1 else 'lines are'} in the artifact scorecard.html.",
    )


def fitting(lines: Sequence[str], characters: int, rest: Callable[[int], str]) -> str:
    """As many of the lines as so many characters hold, and where some are left out `rest` of their number."""
    kept, more = list(lines), ""
    while len("\n".join(kept)) + len(more) > characters and kept:
        kept.pop()
        more = f"\n\n{rest(len(lines) - len(kept))}"
    return "\n".join(kept) + more


def scorecard_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table. MLflow's pages draw cells without any space between, so each brings its own."""
    columns = columns_of(rows)
    drawn = [[column.title for column in columns]]
    for line in lines_of(rows):
        texts = ((line.text(column), column.is_number) for column in columns)
        drawn.append([text.replace(" ", "\u00a0") if is_number else markdown(text) for text, is_number in texts])
    lines = ["| " + " | ".join(cell + GAP for cell in cells) + " |" for cells in drawn]
    return [lines[0], "| " + " | ".join(["---"] * len(columns)) + " |", *lines[1:]]
