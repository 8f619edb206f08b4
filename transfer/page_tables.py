"""The tables of the report's page: scorecard, search, failures, costs, provenance."""

from __future__ import annotations

import statistics as stdlib_statistics
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from transfer import plots
from transfer.ledger import Entry
from transfer.page_parts import esc, hours, is_said, public, settings, table, table_row, value_with_half
from transfer.report import METHODS, SHORT, Findings, Row, shots_order, shots_text


def scorecard_table(rows: Sequence[Row]) -> str:
    body, previous = "", None
    for row in rows:
        new = row.task != previous
        previous = row.task
        failed = f' <span class="failed">{row.num_failed} failed</span>' if row.num_failed else ""
        style = row.verdict if row.verdict in ("wins", "loses") else "unclear"
        body += table_row(
            [
                esc(row.task_title) if new else "",
                esc(SHORT.get(row.method, row.method)),
                esc(shots_text(row.shots)),
                value_with_half(row.pretrained),
                value_with_half(row.scratch),
                value_with_half(row.gain, sign=True),
                str(row.gain.n if row.gain else 0),
                f'<span class="{style}">{esc(row.verdict)}</span>{failed}',
            ],
            numbers={2, 3, 4, 5, 6},
            style="first" if new else "",
        )
    head = ["task", "method", "images a class", "pretrained, %", "from scratch, %", "gain, points", "n", "verdict"]
    return (
        "<h2>Scorecard</h2>"
        + table(head, body, numbers={2, 3, 4, 5, 6})
        + "<p class='note below'>± is the half width of a 95 % Student-t interval of the mean over <i>n</i> seeds; the "
        "gain is paired by seed. “Wins” and “loses” are said only where the interval of the paired gain leaves zero "
        "out. A seed draws the training images and the new head, so the interval says how much other draws would move "
        "the mean. It does not cover other test images, nor another pretraining run, of which there is one. With three "
        "seeds it is wide for good reason, and verdicts are not corrected for the number of rows.</p>"
    )


def search_table(findings: Findings) -> str:
    cells = {(c.task, c.method, c.init, c.shots, c.selection): c.task_title for c in findings.cells}
    body, previous = "", None
    for key in sorted(cells, key=lambda k: (k[0], k[1], shots_order(k[3]), k[2])):
        task, method, init, shots, name = key
        record = findings.selections.get(name or f"{task}-{method}-{init}-{shots}", {})
        num_tried, scores = _scores(record)
        if not scores or num_tried < 2:  # nothing was searched: ridge has one fixed setting
            continue
        middle = stdlib_statistics.median(scores)
        body += table_row(
            [
                esc(cells[key]) if task != previous else "",
                esc(SHORT.get(method, method)),
                esc(plots.INITS.get(init, init)),
                esc(shots_text(shots)),
                f"{num_tried}",
                f"{len(scores)}",
                *(f"{100 * v:.1f}" for v in (min(scores), middle, max(scores), max(scores) - middle)),
                f"<code>{esc(settings(record.get('hyperparameters')))}</code>",
            ],
            numbers={3, 4, 5, 6, 7, 8, 9},
            style="first" if task != previous else "",
        )
        previous = task
    if not body:
        return ""
    head = [
        "task",
        "method",
        "start",
        "shots",
        "tried",
        "run out",
        "worst",
        "median",
        "best",
        "best − median",
        "chosen",
    ]
    return (
        "<h2>What the search was worth</h2><p class=note>Scores on the selection split, per cent, of the candidates "
        "that ran to their end; the others were stopped early. Settings were chosen on these and written down "
        f"({len(findings.selections)} selection records) before a test split was opened; each start picks its own.</p>"
        + table(head, body, numbers={3, 4, 5, 6, 7, 8, 9})
    )


def failures(findings: Findings) -> str:
    failed = [cell for cell in findings.cells if not cell.is_ok]
    not_run = findings.sweep.get("not_run") or []
    out = ""
    if failed:
        body = "".join(
            table_row(
                [
                    *map(esc, (c.task_title, c.kind, SHORT.get(c.method, c.method), plots.INITS.get(c.init, c.init))),
                    esc(shots_text(c.shots)),
                    str(c.seed),
                    f"{esc(c.error or 'no message')} <code>{esc(c.digest[:12])}</code>",
                ],
                numbers={4, 5},
                style="failed",
            )
            for c in failed
        )
        head = ["task", "kind", "method", "start", "shots", "seed", "error and trial"]
        out += f"<h2>Failed trials</h2>{table(head, body, numbers={4, 5})}"
    if not_run:
        body = "".join(
            table_row(
                [
                    *map(esc, (i.get("task"), SHORT.get(i.get("method"), i.get("method")))),
                    esc(shots_text(int(i.get("shots") or 0))),
                    esc(i.get("reason")),
                ],
                numbers={2},
            )
            for i in not_run
        )
        out += f"<h2>Not run</h2>{table(['task', 'method', 'shots', 'reason'], body, numbers={2})}"
    return out


def costs(findings: Findings) -> str:
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for cell in findings.cells:
        groups[cell.method, cell.kind, cell.init].append(cell)
    body = "".join(
        table_row(
            [
                *map(esc, (METHODS.get(method, method), kind, plots.INITS.get(init, init), f"{len(cells):,}")),
                hours(sum(c.seconds_s for c in cells)),
                f"{sum(c.images_seen for c in cells):,}",
            ],
            numbers={3, 4, 5},
        )
        for (method, kind, init), cells in sorted(groups.items())
    )
    head = ["method", "kind", "start", "trials", "time", "images seen"]
    return f"<h2>Costs</h2>{table(head, body, numbers={3, 4, 5})}"


def provenance(findings: Findings, rows: Sequence[Row]) -> str:
    sweep = findings.sweep
    data = {cell.task_title: cell.data_digest for cell in findings.cells}
    started = sweep.get("started_s")
    when = datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M UTC") if started else None
    items = [
        ("model", esc(sweep.get("model"))),
        ("checkpoint", f"<code>{esc(public(sweep.get('checkpoint_url')))}</code>"),
        ("its digest", f"<code>{esc(sweep.get('checkpoint_digest'))}</code>"),
        ("suite", esc(sweep.get("suite"))),
        ("protocols", "<br>".join(f"<code>{esc(d)}</code>" for d in sorted({row.protocol_digest for row in rows}))),
        ("data digests", "<br>".join(f"{esc(t)} <code>{esc(d)}</code>" for t, d in sorted(data.items()))),
        ("started", esc(when)),
        ("hardware", esc(settings(sweep.get("hardware")))),
        ("ledger", f"<code>{esc(public(findings.url))}</code>"),
        ("command", f"<pre>{esc(public(sweep.get('command')))}</pre>"),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items if is_said(value))
    return f"<h2>Where this comes from</h2><dl>{listed}</dl>"


def _scores(record: dict[str, Any]) -> tuple[int, list[float]]:
    """Of a selection record: how many candidates were tried, and the scores of those that ran to their end."""
    candidates = [c for c in record.get("candidates") or [] if isinstance(c, dict)]
    scores = []
    for one in candidates:
        end = (one.get("hyperparameters") or {}).get("num_steps")
        is_whole = one.get("status", "ok") == "ok" and (end is None or one.get("step", end) == end)
        if is_whole and isinstance(one.get("score"), int | float):
            scores.append(float(one["score"]))
    return len(candidates), scores
