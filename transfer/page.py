"""The report as one HTML page that stands alone: no script, no font, no picture from anywhere else.

Every text that comes from data goes through `_e`.
"""

from __future__ import annotations

import html
import json
import re
import statistics as stdlib_statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from transfer import plots
from transfer.page_style import STYLE
from transfer.report import METHODS, SHORT, Cell, Ledger, Row, shots_order, shots_text
from transfer.statistics import Estimate, estimate


def render(ledger: Ledger, rows: Sequence[Row]) -> str:
    """The whole page."""
    title = _headline(rows)
    sections = [
        _head(ledger, rows, title),
        _summary(rows),
        _curves(ledger, rows),
        _table(rows),
        _search(ledger),
        _learning(ledger),
        _failures(ledger),
        _costs(ledger),
        _provenance(ledger, rows),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(filter(None, sections))}\n</main></body></html>\n"
    )


def headline_shots(rows: Sequence[Row]) -> int:
    """The number of images a class that the page's first sentence is about: 5, or the nearest that was run."""
    return min({row.shots for row in rows}, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))


def _headline(rows: Sequence[Row]) -> str:
    shots = headline_shots(rows)
    here = [row for row in rows if row.shots == shots]
    counts = Counter(row.verdict for row in here)
    num_judged = len(here) - counts["one seed"] - counts["no pair"]
    at = "with all images" if shots <= 0 else f"at {shots} image{'s' * (shots != 1)} a class"
    if num_judged == 0:
        return f"No verdict {at} yet: each comparison has one seed, or lacks its twin"
    # Comparisons and not tasks: counting a task as won when any of several methods wins would flatter.
    text = f"Pretraining wins {counts['wins']} of {num_judged} comparison{'s' * (num_judged != 1)} {at}"
    return text + (f", and loses {counts['loses']}" if counts["loses"] else "")


def _head(ledger: Ledger, rows: Sequence[Row], title: str) -> str:
    sweep, shots = ledger.sweep, headline_shots(rows)
    gains = [row for row in rows if row.shots == shots and row.gain]
    best = max(gains, key=lambda row: row.gain.mean if row.gain else 0.0, default=None)
    lead = ""
    if best is not None and best.gain is not None and best.pretrained and best.scratch:
        lead = (
            f"<p class=lead>The largest gain at {text(shots_text(shots))} a class is on {text(best.task_title)} by "
            f"{text(METHODS.get(best.method, best.method))}: {100 * best.pretrained.mean:.1f} % against "
            f"{100 * best.scratch.mean:.1f} % from scratch, {plain(best.gain, sign=True)} points.</p>"
        )
    finals = [cell for cell in ledger.cells if cell.kind == "final"]
    good = [cell for cell in finals if cell.status == "ok"]
    seeds = sorted({len({c.seed for c in good if (c.task, c.method, c.shots) == key}) for key in _keys(good)})
    facts = [
        (str(len({row.task for row in rows})), "tasks"),
        (f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "0", "seeds a cell"),
        (f"{len(finals):,}", "final trials"),
        (f"{len(ledger.cells) - len(finals):,}", "search trials"),
        (hours(sum(cell.seconds_s for cell in ledger.cells)), "of computing"),
    ]
    if num_failed := sum(cell.status != "ok" for cell in ledger.cells):
        facts.append((f"<em>{num_failed}</em>", "failed trials"))
    cards = "".join(f"<div class=fact><b>{value}</b><span>{text(name)}</span></div>" for value, name in facts)
    kicker = " · ".join(str(part) for part in ("normfree scorecard", sweep.get("model"), sweep.get("suite")) if part)
    return f"<header><p class=kicker>{text(kicker)}</p><h1>{text(title)}</h1>{lead}<div class=facts>{cards}</div></header>"


def _summary(rows: Sequence[Row]) -> str:
    shots = headline_shots(rows)
    if not any(row.gain and row.shots == shots for row in rows):
        return ""
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.gain is not None:
            groups[row.shots, row.method].append(row)
    body = ""
    for (number, method), group in sorted(
        groups.items(), key=lambda item: (shots_order(item[0][0]), item[0][1] != "ridge")
    ):
        counts = Counter(row.verdict for row in group)
        over_tasks = estimate([row.gain.mean for row in group if row.gain])
        rest = len(group) - counts["wins"] - counts["loses"]
        body += table_row(
            [
                text(shots_text(number)),
                text(SHORT.get(method, method)),
                value_with_half(over_tasks, sign=True),
                *map(str, (counts["wins"], rest, counts["loses"])),
            ],
            numbers={0, 2, 3, 4, 5},
        )
    tasks_note = "The interval of this table is over tasks, each with its mean over seeds."
    head = ["images a class", "method", "mean gain, points", "wins", "not clear", "loses"]
    return (
        f"<h2>What pretraining is worth</h2><p class=note>Gain over a from-scratch twin of equal budget, at "
        f"{text(shots_text(shots))} images a class.</p>"
        f"<figure class=wide>{plots.gains(rows, shots)}</figure>"
        + table(head, body, numbers={0, 2, 3, 4, 5})
        + f"<p class='note below'>{tasks_note}</p>"
    )


def _curves(ledger: Ledger, rows: Sequence[Row]) -> str:
    finals = [cell for cell in ledger.cells if cell.kind == "final" and cell.status == "ok"]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.pretrained or row.scratch:
            groups[row.task, row.method].append(row)
    figures = "".join(
        f"<figure><figcaption>{text(group[0].task_title)} <span>{text(METHODS.get(method, method))}</span></figcaption>"
        f"{plots.few_shot(group, finals)}</figure>"
        for (_, method), group in groups.items()
    )
    return (
        "<h2>Few-shot curves</h2><p class=note>Mean over seeds with its interval; each pale dot is one seed. "
        f"The scales differ from plot to plot.</p>{_key()}<div class=plots>{figures}</div>"
    )


def _table(rows: Sequence[Row]) -> str:
    body, previous = "", None
    for row in rows:
        new = row.task != previous
        previous = row.task
        failed = f' <span class="failed">{row.num_failed} failed</span>' if row.num_failed else ""
        style = row.verdict if row.verdict in ("wins", "loses") else "unclear"
        body += table_row(
            [
                text(row.task_title) if new else "",
                text(SHORT.get(row.method, row.method)),
                text(shots_text(row.shots)),
                value_with_half(row.pretrained),
                value_with_half(row.scratch),
                value_with_half(row.gain, sign=True),
                str(row.gain.n if row.gain else 0),
                f'<span class="{style}">{text(row.verdict)}</span>{failed}',
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
        "out. A seed draws the training images and the new head, so the interval says how much other draws would move the "
        "mean. It does not cover other test images, nor another pretraining run, of which there is one. With three "
        "seeds it is wide for good reason, and verdicts are not corrected for the number of rows.</p>"
    )


def _search(ledger: Ledger) -> str:
    scores: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    titles = {cell.task: cell.task_title for cell in ledger.cells}
    for cell in ledger.cells:
        if cell.kind == "search" and cell.status == "ok":
            scores[cell.task, cell.method, cell.init, cell.shots].append(cell.value)
    names = {f"{t}-{m}-{i}-{s}": (t, m, i, s) for t, m, i, s in {*scores, *_four(ledger.cells)}}
    for name, record in ledger.selections.items():
        if name in names and not scores[names[name]]:
            scores[names[name]] = list(_candidate_scores(record))
    body, previous = "", None
    for key in sorted((k for k in scores if scores[k]), key=lambda k: (k[0], k[1], shots_order(k[3]), k[2])):
        task, method, init, shots = key
        record = ledger.selections.get(f"{task}-{method}-{init}-{shots}", {})
        chosen = record.get("chosen", record.get("hyperparameters"))
        values = scores[key]
        middle = stdlib_statistics.median(values)
        body += table_row(
            [
                text(titles.get(task, task)) if task != previous else "",
                text(SHORT.get(method, method)),
                text(plots.INITS.get(init, init)),
            ]
            + [text(shots_text(shots)), str(len(values))]
            + [f"{100 * v:.1f}" for v in (min(values), middle, max(values), max(values) - middle)]
            + [f"<code>{text(settings(chosen))}</code>"],
            numbers={3, 4, 5, 6, 7, 8},
            style="first" if task != previous else "",
        )
        previous = task
    if not body:
        return ""
    head = ["task", "method", "start", "shots", "tried", "worst", "median", "best", "best − median", "chosen"]
    return (
        "<h2>What the search was worth</h2><p class=note>Scores on the selection split, per cent. Settings were "
        f"chosen on these and written down ({len(ledger.selections)} selection records) before a test split was "
        "opened; each start picks its own.</p>" + table(head, body, numbers={3, 4, 5, 6, 7, 8})
    )


def _learning(ledger: Ledger) -> str:
    groups: dict[int, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in ledger.cells:
        if cell.kind == "final" and cell.status == "ok" and cell.method == "finetune" and len(cell.history) > 1:
            groups[cell.shots][cell.task].append(cell)
    if not groups:
        return ""
    first = min(groups, key=lambda s: (abs(shots_order(s) - plots.HEADLINE_SHOTS), s))
    out = ""
    for shots in sorted(groups, key=lambda s: (s != first, shots_order(s))):
        figures = "".join(
            f"<figure><figcaption>{text(cells[0].task_title)} <span>{text(shots_text(shots))} a class</span></figcaption>"
            f"{plots.learning(cells)}</figure>"
            for _, cells in sorted(groups[shots].items())
        )
        opened = " open" if shots == first else ""
        summary = f"<summary>{text(shots_text(shots))} image{'s' * (shots != 1)} a class</summary>"
        out += f"<details{opened}>{summary}<div class=plots>{figures}</div></details>"
    note = "Training loss of the final trials, a line a seed, on a logarithmic scale."
    return f"<h2>Learning curves of the fine-tunings</h2><p class=note>{note}</p>{_key()}{out}"


def _failures(ledger: Ledger) -> str:
    failed = [cell for cell in ledger.cells if cell.status != "ok"]
    not_run = ledger.sweep.get("not_run") or []
    out = ""
    if failed:
        body = "".join(
            table_row(
                [
                    *map(text, (c.task_title, c.kind, SHORT.get(c.method, c.method), plots.INITS.get(c.init, c.init))),
                    text(shots_text(c.shots)),
                    str(c.seed),
                    f"{text(c.error or 'no message')} <code>{text(c.digest[:12])}</code>",
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
            table_row([text(i.get("task")), text(shots_text(int(i.get("shots") or 0))), text(i.get("reason"))], numbers={1})
            for i in not_run
        )
        out += f"<h2>Not run</h2>{table(['task', 'shots', 'reason'], body, numbers={1})}"
    return out


def _costs(ledger: Ledger) -> str:
    groups: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in ledger.cells:
        groups[cell.method, cell.kind, cell.init].append(cell)
    body = "".join(
        table_row(
            [
                *map(text, (METHODS.get(method, method), kind, plots.INITS.get(init, init), f"{len(cells):,}")),
                hours(sum(c.seconds_s for c in cells)),
                f"{sum(c.images_seen for c in cells):,}",
            ],
            numbers={3, 4, 5},
        )
        for (method, kind, init), cells in sorted(groups.items())
    )
    head = ["method", "kind", "start", "trials", "time", "images seen"]
    return f"<h2>Costs</h2>{table(head, body, numbers={3, 4, 5})}"


def _provenance(ledger: Ledger, rows: Sequence[Row]) -> str:
    sweep = ledger.sweep
    data = {cell.task_title: cell.data_digest for cell in ledger.cells}
    started = sweep.get("started_s")
    when = datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M UTC") if started else None
    items = [
        ("model", text(sweep.get("model"))),
        ("checkpoint", f"<code>{text(public(sweep.get('checkpoint_url')))}</code>"),
        ("its digest", f"<code>{text(sweep.get('checkpoint_digest'))}</code>"),
        ("suite", text(sweep.get("suite"))),
        ("protocols", "<br>".join(f"<code>{text(d)}</code>" for d in sorted({row.protocol_digest for row in rows}))),
        ("data digests", "<br>".join(f"{text(t)} <code>{text(d)}</code>" for t, d in sorted(data.items()))),
        ("started", text(when)),
        ("hardware", text(settings(sweep.get("hardware")))),
        ("ledger", f"<code>{text(public(ledger.url))}</code>"),
        ("command", f"<pre>{text(public(sweep.get('command')))}</pre>"),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items if is_said(value))
    return f"<h2>Where this comes from</h2><dl>{listed}</dl>"


def _candidate_scores(record: dict[str, Any]) -> Iterable[float]:
    for candidate in record.get("candidates") or []:
        value = candidate.get("score", candidate.get("value")) if isinstance(candidate, dict) else None
        if isinstance(value, int | float):
            yield float(value)


def _four(cells: Iterable[Cell]) -> set[tuple[str, str, str, int]]:
    return {(c.task, c.method, c.init, c.shots) for c in cells}


def _keys(cells: Iterable[Cell]) -> set[tuple[str, str, int]]:
    return {(c.task, c.method, c.shots) for c in cells}


def _key() -> str:
    spans = "".join(f'<span><i style="background:var(--{i})"></i>{text}</span>' for i, text in plots.INITS.items())
    return f"<div class=key>{spans}</div>"
