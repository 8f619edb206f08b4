"""Behind each number of the report's page: its trials, where it comes from, and what it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np

from pipeline.storage import objects
from transfer.measurement.predictions import url_of
from transfer.report.html_elements import (
    anchor,
    esc,
    fold,
    hours,
    is_said,
    link,
    memory,
    pretty,
    public,
    settings,
    table,
    table_row,
    value_with_half,
)
from transfer.results.error_analysis import Confusion, confusion
from transfer.results.scorecard import shots_phrase, start_of
from transfer.results.statistics import estimate
from transfer.results.sweep_results import Findings
from transfer.sweep.ledger import Entry

MAX_MATRIX_CLASSES = 16
MAX_LISTED_CLASSES = 24
NUM_PAIRS = 12


def cells_section(findings: Findings) -> str:
    """All cells with a number, by task."""
    out, previous = "", ""
    for name, entries in findings.by_cell().items():
        if entries[0].task != previous:
            out += f"<h3 class=sub>{esc(entries[0].task_title)}</h3>"
            previous = entries[0].task
        out += _cell(findings, name, entries)
    note = "Where each number comes from: its trials with their records, its configuration, and its mistakes."
    return f"<h2>Cells</h2><p class=note>{note}</p>{out}"


def _cell(findings: Findings, name: str, entries: list[Entry]) -> str:
    first = entries[0]
    start = start_of(first)
    mean = value_with_half(estimate([float(e.value or 0.0) for e in entries]))
    summary = (
        f"{esc(first.method_title or first.method)}, {esc(shots_phrase(first.shots))}, {esc(start)}: "
        f"<b>{mean}</b> <span class=half>n = {len(entries)}</span>"
    )
    body = _seeds(findings, entries) + _lineage(findings, name, entries) + _confusion(findings, entries)
    return fold(summary, f"<div class=cell>{body}</div>", name=anchor("cell", name))


def _seeds(findings: Findings, entries: list[Entry]) -> str:
    names = list(dict.fromkeys((entries[0].metric, *(k for e in entries for k in e.metrics))))
    if "mean_per_class" in names and entries[0].metric != "balanced_accuracy":  # one number under two names
        names = [name for name in names if name != "balanced_accuracy"]
    body = "".join(
        table_row(
            [
                str(e.seed),
                *(
                    f"{100 * v:.2f}" if (v := e.metrics.get(k, e.value if k == e.metric else None)) is not None else "–"
                    for k in names
                ),
                f"{e.num_train:,}",
                f"{e.num_test:,}",
                hours(e.seconds_s),
                memory(e.max_memory_bytes),
                str(sum(o.what == "test" for o in findings.home[e.digest].openings.get(e.digest, []))),
                f"<code>{esc(e.digest[:12])}</code>",
            ],
            numbers=set(range(1, 6 + len(names))),
        )
        for e in entries
    )
    head = [
        "seed",
        *(n.replace("_", " ") + ", %" for n in names),
        "trained on",
        "tested on",
        "time",
        "memory",
        "test opened",
        "trial",
    ]
    return table(head, body, numbers=set(range(1, 6 + len(names))))


def _lineage(findings: Findings, name: str, entries: list[Entry]) -> str:
    first = entries[0]
    home, record = findings.home[first.digest], findings.selection(first)
    files = [objects.join(home.url, "trials", f"{e.digest}.json") for e in entries]
    kept = [url_of(home.url, e.digest) for e in entries if e.digest in home.predicted]
    source = first.checkpoint_digest or first.backbone_digest
    items = [
        ("run again", f"<code>{esc(public(f'normfree report {home.url} --rerun {name}'))}</code>"),
        ("sweep", link(f"<code>{esc(public(home.url))}</code>", "sweep", home.url)),
        ("source", link(f"<code>{esc(source[:16])}</code>", "source", source)),
        ("data", link(f"<code>{esc(first.data_digest[:16])}</code>", "data", first.data_digest)),
        ("protocol", f"<code>{esc(first.protocol_digest)}</code>"),
        ("chosen", f"<code>{esc(settings(first.hyperparameters) or 'nothing to choose')}</code>"),
        ("code", f"<code>{esc(first.code_revision)}</code>"),
        ("trials", _listed(files)),
        ("predictions", _listed(kept)),
    ]
    listed = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in items if is_said(value))
    folds = ""
    if record:
        when = _time(record.get("time_s"))
        folds += fold(
            f"selection record{f', written {when}' if when else ''}: {esc(record.get('rule'))}", pretty(record)
        )
    opened = [(o, e) for e in entries for o in home.openings.get(e.digest, [])]
    if opened:
        lines = "".join(
            f"<li>seed {e.seed}: {_time(o.time_s)}, record <code>{o.selection_sha256[:16]}</code>"
            f"{'' if o.what == 'test' else f', {esc(o.what)}'}</li>"
            for o, e in opened
        )
        again = len(opened) - len({(o.what, e.digest) for o, e in opened})
        more = f", {again} of them by a trial that had opened it before" if again else ""
        folds += fold(f"the test split was opened {len(opened)} times{more}", f"<ul>{lines}</ul>")
    if first.config:
        digests = ", ".join(e.config_digest[:12] for e in entries)
        folds += fold(
            f"configuration of seed {first.seed}; digests of all seeds: <code>{esc(digests)}</code>",
            pretty(first.config),
        )
    return f"<dl>{listed}</dl>{folds}"


def _listed(files: Sequence[str]) -> str:
    return "<br>".join(f"<code>{esc(public(file))}</code>" for file in files)


def _time(seconds_s: float | None) -> str:
    return datetime.fromtimestamp(seconds_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if seconds_s else ""


def _confusion(findings: Findings, entries: list[Entry]) -> str:
    predicted = [p for e in entries if (p := findings.predictions(e)) is not None]
    if not predicted:
        return "<p class=note>Its trials kept no predictions.</p>"
    data = findings.datasets[entries[0].task]
    classes = () if isinstance(data, str) else data.classes
    found = confusion(predicted, len(classes))
    names = [classes[i] if i < len(classes) else str(i) for i in range(len(found.counts))]
    seeds = "" if found.num_seeds == 1 else f", the {found.num_seeds} seeds summed"
    if len(names) <= MAX_MATRIX_CLASSES:
        return f"<h4>Confusion, per cent of each class's test images{seeds}</h4>{_matrix(found, names)}"
    return (
        f"<h4>Classes, worst first{seeds}</h4>{_classes(found, names)}"
        f"<h4>Most frequent confusions</h4>{_pairs(found, names)}"
    )


def _matrix(found: Confusion, names: Sequence[str]) -> str:
    shares = found.counts / np.maximum(1, found.counts.sum(1, keepdims=True))
    body = ""
    for i, name in enumerate(names):
        cells = "".join(
            f"<td {_tint(i == j, share)}>{100 * share:.0f}</td>" if share >= 0.005 else "<td></td>"
            for j, share in enumerate(shares[i])
        )
        body += f"<tr><td class=t>{esc(name)}</td><td class=n>{int(found.counts[i].sum() / found.num_seeds):,}</td>{cells}</tr>\n"
    head = "".join(f"<th class='n name'>{esc(name)}</th>" for name in names)
    return (
        f"<div class=scroll><table class=matrix><thead><tr><th>is ↓ called →</th><th class=n>images</th>{head}</tr></thead>"
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _tint(is_right: bool, share: float) -> str:
    """Attributes of a cell; the page's style makes a colour of them."""
    return f"class={'hit' if is_right else 'miss'} style=--s:{60 * share:.0f}"


def _classes(found: Confusion, names: Sequence[str]) -> str:
    recalls, totals = found.recalls, found.counts.sum(1) / found.num_seeds
    order = [int(i) for i in np.argsort(recalls, kind="stable") if not np.isnan(recalls[i])]
    shown = order[:MAX_LISTED_CLASSES]
    body = "".join(
        f'<span class=class><i style="width:{100 * recalls[i]:.0f}%"></i><b>{esc(names[i])}</b> '
        f"{100 * recalls[i]:.0f} % <small>of {totals[i]:.0f}</small></span>"
        for i in shown
    )
    rest, more = order[len(shown) :], ""
    if rest:
        ends = f"{100 * recalls[rest[0]]:.0f} to {100 * recalls[rest[-1]]:.0f}"
        more = f"<p class=note>{len(rest)} other classes lie from {ends} %.</p>"
    return f"<div class=classes>{body}</div>{more}"


def _pairs(found: Confusion, names: Sequence[str]) -> str:
    body = "".join(
        table_row([esc(names[a]), esc(names[b]), f"{100 * share:.0f} %"], numbers={2})
        for a, b, share in found.worst_pairs(NUM_PAIRS)
    )
    return table(["is", "called", "share of its images"], body, numbers={2})
