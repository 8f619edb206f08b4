"""From a sweep's ledger to a scorecard: who wins, by how much, and how sure that is.

Reads what the sweep wrote (`trials/*.json`, `selection/*.json`, `sweep.json`) and nothing else, so a report can be made
anywhere and any time. Shares (0 to 1) everywhere inside; points and per cent only where people read.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from pipeline import storage
from pipeline.errors import UserError
from transfer.ledger import Entry, Ledger
from transfer.statistics import Estimate, estimate, paired, verdict

METHODS = {
    "ridge": "ridge on frozen features",
    "ridge_selected": "ridge, penalty selected",
    "knn": "nearest neighbours",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "finetune": "fine-tuning",
    "hyperrule": "BiT-HyperRule",
    "nfnet": "NFNet fine-tuning",
    "nfnet_plain": "NFNet fine-tuning, not regularised",
    "convnets_at_scale": "ConvNets at scale",
}
SHORT = METHODS | {"ridge": "ridge"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the scorecard: a task by a method at a number of images a class."""

    task: str
    task_title: str
    method: str
    shots: int
    metric: str
    pretrained: Estimate | None
    scratch: Estimate | None
    gain: Estimate | None
    """Pretrained minus scratch, paired by seed; its `n` is the number of pairs."""
    verdict: str
    num_failed: int
    protocol_digest: str
    backbone: str = ""
    """Which checkpoint, where a sweep compares several; its from-scratch twin has the same architecture."""


@dataclass(frozen=True)
class Findings:
    """All that a sweep's folder says."""

    url: str
    cells: list[Entry]
    selections: dict[str, dict[str, Any]]
    """By the name of the record: task-method-init-shots."""
    sweep: dict[str, Any]


def load_entries(sweep_url: str | os.PathLike[str]) -> list[Entry]:
    """Every finished trial of a sweep, in the order of digests. UserError if there is none, or one is no trial."""
    found = list(Ledger(os.fspath(sweep_url)).entries())
    if not found:
        raise UserError(
            f"no finished trial under {sweep_url}; give the folder that 'normfree transfer' wrote to (--out)"
        )
    return found


def load_findings(sweep_url: str | os.PathLike[str]) -> Findings:
    """Trials, selection records and the sweep's own description ({} if it is not there)."""
    cells = load_entries(sweep_url)
    urls = storage.list_urls(storage.join(sweep_url, "selection"), ".json")
    selections = {url.rpartition("/")[2].removesuffix(".json"): _read_json(url) for url in urls}
    about = storage.join(sweep_url, "sweep.json")
    return Findings(os.fspath(sweep_url), cells, selections, _read_json(about) if storage.exists(about) else {})


def scorecard(cells: Iterable[Entry]) -> list[Row]:
    """One row for each task, method and number of images a class, from the final trials. Failed ones count as failed.

    UserError where trials of one row do not compare: different protocols, data or checkpoints, or a seed twice.
    """
    groups: dict[tuple[str, str, int], list[Entry]] = defaultdict(list)
    for cell in cells:
        if cell.kind == "final":
            groups[cell.task, cell.method, cell.shots].append(cell)
    order = list(METHODS)
    keys = sorted(
        groups, key=lambda k: (k[0], order.index(k[1]) if k[1] in METHODS else len(order), k[1], shots_order(k[2]))
    )
    return [_row(part, name) for key in keys for name, part in _by_backbone(groups[key]).items()]


def _by_backbone(cells: list[Entry]) -> dict[str, list[Entry]]:
    """The trials of each checkpoint with those of its from-scratch twin."""
    twins: dict[str, str] = {c.backbone: c.backbone_digest for c in cells if c.init == "pretrained"}
    if len(twins) < 2:
        return {next(iter(twins), ""): cells}
    return {
        name: [
            c for c in cells if (c.backbone == name if c.init == "pretrained" else c.backbone_digest == architecture)
        ]
        for name, architecture in sorted(twins.items())
    }


def shots_order(shots: int) -> float:
    """Sorts numbers of images a class, with "all" (0 or less) at the end."""
    return shots if shots > 0 else float("inf")


def shots_text(shots: int) -> str:
    return str(shots) if shots > 0 else "all"


def percent(value: Estimate | None, *, sign: bool = False) -> str:
    """72.4 ± 1.8 in per cent (or points); one seed is marked, none is a dash."""
    if value is None:
        return "-"
    number = f"{100 * value.mean:+.1f}" if sign else f"{100 * value.mean:.1f}"
    return f"{number} (one seed)" if value.half_width is None else f"{number} ± {100 * value.half_width:.1f}"


def print_table(rows: Sequence[Row], stream: TextIO | None = None) -> None:
    """The scorecard in the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    several = len({row.backbone for row in rows}) > 1
    for name in (
        "task",
        *(["backbone"] if several else []),
        "method",
        "shots",
        "pretrained %",
        "from scratch %",
        "gain, points",
        "n",
        "",
    ):
        table.add_column(
            name, justify="left" if name in ("task", "backbone", "method", "") else "right", no_wrap=name != "task"
        )
    styles = {"wins": "green", "loses": "red"}
    for row, previous in zip(rows, [None, *rows], strict=False):
        failed = f", {row.num_failed} failed" if row.num_failed else ""
        table.add_row(
            Text(row.task_title if previous is None or previous.task != row.task else ""),
            *([row.backbone] if several else []),
            SHORT.get(row.method, row.method),
            shots_text(row.shots),
            percent(row.pretrained),
            percent(row.scratch),
            percent(row.gain, sign=True),
            str(row.gain.n if row.gain else 0),
            Text(row.verdict + failed, style=styles.get(row.verdict, "dim")),
        )
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:  # in a log, a line that is cut at 80 characters has lost its verdict
        console.width = 160
    console.print(table)
    console.print("± half width of a 95 % Student-t interval over seeds; the gain is paired by seed", style="dim")


def to_csv(rows: Sequence[Row]) -> str:
    """The scorecard as CSV, all values as shares."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [f"{side}_{end}" for side in ("pretrained", "scratch", "gain") for end in ("mean", "low", "high", "n")]
    names = [
        "task",
        "task_title",
        "method",
        "shots",
        "metric",
        *parts,
        "verdict",
        "num_failed",
        "protocol_digest",
        "backbone",
    ]
    writer.writerow(names)
    for row in rows:
        estimates: list[Any] = []
        for side in (row.pretrained, row.scratch, row.gain):
            estimates += [side.mean, side.low, side.high, side.n] if side else ["", "", "", 0]
        head = [row.task, row.task_title, row.method, row.shots, row.metric]
        writer.writerow([*head, *estimates, row.verdict, row.num_failed, row.protocol_digest, row.backbone])
    return out.getvalue()


def write_report(
    sweep_url: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, show: bool = True
) -> dict[str, str]:
    """Prints the scorecard (`show`) and writes scorecard.csv, .html and .png under `out_dir`; {kind: path or URL}."""
    from transfer.page import render
    from transfer.plots import picture

    findings = load_findings(sweep_url)
    rows = scorecard(findings.cells)
    if show:
        print_table(rows)
    finals = [cell for cell in findings.cells if cell.kind == "final" and cell.is_ok]
    files: dict[str, Callable[[], bytes]] = {
        "csv": lambda: to_csv(rows).encode(),
        "html": lambda: render(findings, rows).encode(),
        "png": lambda: picture(rows, finals),
    }
    paths = {kind: storage.join(out_dir, f"scorecard.{kind}") for kind in files}
    for kind, make in files.items():
        storage.write_bytes(paths[kind], make())
    return paths


def _row(cells: list[Entry], backbone: str) -> Row:
    first = cells[0]
    where = f"{first.task}, {first.method}, {shots_text(first.shots)} images a class"
    good = [cell for cell in cells if cell.is_ok]
    for name, values in (
        ("protocols", {c.protocol_digest for c in good}),
        ("data", {c.data_digest for c in good}),
        ("checkpoints", {str(c.checkpoint_digest) for c in good if c.init == "pretrained"}),
    ):
        if len(values) > 1:
            listed = ", ".join(sorted(value[:12] for value in values))
            raise UserError(
                f"{where}: trials of different {name} ({listed}) do not compare in one row; "
                "run the sweep that you mean into a folder of its own (--out)"
            )
    sides: dict[str, dict[int, float]] = {"pretrained": {}, "scratch": {}}
    for cell in good:
        side = sides.setdefault(cell.init, {})
        if cell.seed in side:
            raise UserError(
                f"{where}: seed {cell.seed} of {cell.init} is there twice (once as {cell.digest[:12]}); "
                "remove the trial file that does not belong to this sweep"
            )
        assert cell.value is not None
        side[cell.seed] = cell.value
    gain = paired(sides["pretrained"], sides["scratch"])
    return Row(
        task=first.task,
        task_title=first.task_title,
        method=first.method,
        shots=first.shots,
        metric=first.metric,
        pretrained=estimate(list(sides["pretrained"].values())),
        scratch=estimate(list(sides["scratch"].values())),
        gain=gain,
        verdict=verdict(gain),
        num_failed=len(cells) - len(good),
        protocol_digest=first.protocol_digest,
        backbone=backbone,
    )


def _read_json(url: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is not readable as JSON ({error}); remove it, and the sweep runs it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{url} does not hold one JSON object; remove it")
    return value
