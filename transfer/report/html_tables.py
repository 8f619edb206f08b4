"""The tables of the report's page: scorecard, sources side by side, comparison over tasks, failures, costs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from transfer.protocol.imagenet_labels import BESIDE
from transfer.report import plots
from transfer.report.html_elements import esc, hours, link, memory, table, table_row, value_with_half
from transfer.results.comparison import Versus
from transfer.results.scorecard import Row, shots_text, start_of, with_beside
from transfer.results.statistics import Estimate, smallest_p
from transfer.results.sweep_results import Findings
from transfer.results.vtab_score import GROUPS, vtab_scores
from transfer.sweep.ledger import Entry

INTERVAL_NOTE = (
    "± is the half width of a 95 % Student-t interval of the mean over <i>n</i> seeds; the gain is paired by seed. “Wins” and "
    "“loses” are said only where the interval of the paired gain leaves zero out. A seed draws the training images and the new "
    "head, so the interval says how much other draws would move the mean. It does not cover other test images, nor another "
    "pretraining run, of which there is one. With three seeds it is wide for good reason, and verdicts are not corrected for "
    "the number of rows. Each number leads to its cell: config, digests, records, confusion."
)


def side_by_side(rows: Sequence[Row], sources: Sequence[str]) -> str:
    """A column for each source and for each from-scratch twin; nothing where there is one source."""
    if len(sources) < 2:
        return ""
    twins = list(dict.fromkeys(row.twin for row in rows if row.scratch))
    lines: dict[tuple[str, str, int, str], list[Row]] = defaultdict(list)
    for row in with_beside(rows):
        lines[*row.column, row.metric if row.metric in BESIDE else ""].append(row)
    previous: Row | None = None
    body = ""
    usual = Counter(side.n for row in rows for side in (row.pretrained, row.scratch) if side).most_common(1)
    n = usual[0][0] if usual else 0
    numbers = set(range(2, 3 + len(sources) + len(twins)))
    for group in lines.values():
        first = group[0]
        own = {row.backbone: (row.pretrained, row.pretrained_cell) for row in group}
        fresh = {row.twin: (row.scratch, row.scratch_cell) for row in group if row.scratch}
        body += table_row(
            [
                _title(first, previous),
                esc(first.method),
                esc(shots_text(first.shots)),
                *(_cell(own.get(source, (None, "")), n) for source in sources),
                *(_cell(fresh.get(twin, (None, "")), n) for twin in twins),
            ],
            numbers=numbers,
            style="first" if previous is None or first.task != previous.task else "",
        )
        previous = first
    of = {row.twin: row.backbone for row in reversed(rows)}
    fresh_names = ["from scratch" if len(twins) < 2 else f"scratch, as {of[twin]}" for twin in twins]
    return (
        "<h2>Sources side by side</h2><p class=note>Per cent, mean ± half width of the 95 % interval over seeds; "
        f"<i>n</i> = {n} where nothing else is said. "
        "All numbers of a line were measured by one protocol, on the same data.</p>"
        + f"<div class=narrow>{table(['task', 'method', 'shots', *sources, *fresh_names], body, numbers=numbers)}</div>"
    )


def _title(row: Row, previous: Row | None) -> str:
    """The task where it begins; what is measured besides by its name."""
    if row.metric in BESIDE:
        return f"<span class=half>{esc(plots.metric_title(row.metric))}</span>"
    begins = previous is None or row.task != previous.task or previous.metric in BESIDE
    return esc(row.task_title) if begins else ""


def _cell(found: tuple[Estimate | None, str], usual_n: int) -> str:
    value, name = found
    if value is None:
        return "–"
    return link(value_with_half(value), "cell", name) + (f"<small>n = {value.n}</small>" if value.n != usual_n else "")


def scorecard_table(rows: Sequence[Row]) -> str:
    several = len({row.backbone for row in rows}) > 1
    previous: Row | None = None
    body = ""
    for row in with_beside(rows):
        new, title = previous is None or row.task != previous.task, _title(row, previous)
        previous = row
        failed = f' <span class="failed">{row.num_failed} failed</span>' if row.num_failed else ""
        style = row.verdict if row.verdict in ("wins", "loses") else "unclear"
        n = [side.n for side in (row.pretrained, row.scratch) if side]
        body += table_row(
            [
                title,
                *([f"<span class=unclear>{esc(row.backbone)}</span>"] if several else []),
                esc(row.method if several else row.method_title),
                esc(shots_text(row.shots)),
                link(value_with_half(row.pretrained), "cell", row.pretrained_cell),
                link(value_with_half(row.scratch), "cell", row.scratch_cell),
                value_with_half(row.gain, sign=True),
                "/".join(map(str, dict.fromkeys(n))) or "0",
                f'<span class="{style}">{esc(row.verdict)}</span>{failed}',
            ],
            numbers={i + several for i in range(2, 7)},
            style="first" if new else "",
        )
    head = ["task", *(["source"] if several else []), "method", "shots"]
    head += ["pretrained, %", "from scratch, %", "gain, points", "n", "verdict"]
    metrics = sorted({(row.task_title, plots.metric_title(row.metric)) for row in rows if row.metric != "top1"})
    other = "".join(f" {esc(title)}: {esc(metric)}." for title, metric in metrics)
    said = f" Per cent of test images classified rightly (top-1), if not said otherwise.{other}"
    return (
        "<h2>Scorecard</h2>"
        + table(head, body, numbers={i + several for i in range(2, 7)})
        + f"<p class='note below'>{INTERVAL_NOTE}{said}</p>"
        + _vtab_table(rows)
    )


def _vtab_table(rows: Sequence[Row]) -> str:
    scores = vtab_scores(rows)
    body = "".join(
        table_row(
            [
                esc(one.start),
                esc(one.method),
                *(value_with_half(one.groups.get(group)) for group in GROUPS),
                str(one.num_tasks),
                str(one.groups["all"].n) if one.groups else "–",
            ],
            numbers=set(range(2, 8)),
        )
        for one in scores
    )
    if not body:
        return ""
    head = ["VTAB-1k score", "method", "all 19, %", *(f"{group}, %" for group in GROUPS[1:]), "tasks", "n"]
    note = "The unweighted mean of top-1 over the 19 tasks and over each group; ± over seeds. A mean over fewer is not the score."
    return f"{table(head, body, numbers=set(range(2, 8)))}<p class='note below'>{note}</p>"


def comparison_table(versus: Sequence[Versus]) -> str:
    """Sources against each other and their twins over tasks."""
    body, several = "", len({v.a for v in versus}) > 1
    for v in versus:
        r = v.result
        style = {"better": "wins", "worse": "loses"}.get(r.verdict, "unclear")
        body += table_row(
            [
                f"{esc(v.a if several else 'pretrained')}<small>against {esc(v.b)}</small>",
                esc(v.method),
                esc(shots_text(v.shots)),
                value_with_half(r.difference, sign=True),
                f"{r.wins} · {r.ties} · {r.losses}",
                f"{r.difference.n}",
                f"{r.p_value:.3g}",
                f'<span class="{style}">{esc(r.verdict)}</span>',
            ],
            numbers={2, 3, 4, 5, 6},
        )
    if not body:
        return ""
    head = [
        "over tasks",
        "method",
        "shots",
        "mean difference, points",
        "wins · ties · losses",
        "n tasks",
        "p",
        "verdict",
    ]
    return (
        "<h3 class=sub>Over tasks</h3>"
        + table(head, body, numbers={2, 3, 4, 5, 6})
        + "<p class='note below'>Each task counts once, with its mean over seeds; the interval of this table is over tasks. "
        "<i>p</i> is of the exact two-sided sign-flip permutation test: were both equally good, each task's difference could as "
        f"well have the other sign. With five tasks it cannot fall below {smallest_p(5):.4f}, so a direction needs six at "
        "least, <i>p</i> below 0.05 and an interval without zero. Not corrected for the number of lines.</p>"
    )


def failures(findings: Findings) -> str:
    failed = [cell for cell in findings.cells if not cell.is_ok]
    not_run = [item for folder in findings.folders for item in folder.sweep.get("not_run") or []]
    out = ""
    if failed:
        body = "".join(
            table_row(
                [
                    *map(esc, (c.task_title, c.kind, c.method, plots.INITS.get(c.init, c.init))),
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
                    *map(esc, (i.get("task"), i.get("method") or "all")),
                    esc(shots_text(int(i["shots"]))) if i.get("shots") is not None else "",
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
    measured = any(cell.watts for cell in findings.cells)
    for cell in findings.cells:
        groups[cell.method, cell.kind, start_of(cell)].append(cell)
    body = "".join(
        table_row(
            [
                *map(esc, (cells[0].method_title or method, kind, start, f"{len(cells):,}")),
                hours(sum(c.seconds_s for c in cells)),
                f"{sum(c.seconds_s for c in cells) / len(cells):.1f}",
                f"{sum(c.images_seen for c in cells):,}",
                memory(max(c.max_memory_bytes for c in cells)),
                *([_watts(cells)] if measured else []),
            ],
            numbers={3, 4, 5, 6, 7, 8},
        )
        for (method, kind, start), cells in sorted(groups.items())
    )
    head = ["method", "kind", "start", "trials", "time", "s a trial", "training images seen", "peak memory"]
    if measured:
        power = "Watts are those of the whole processors and GPU while a trial ran: trials side by side are each told all of it."
    else:
        power = "Watts: not measured (the machine let neither RAPL nor nvidia-smi be read)."
    return (
        f"<h2>Costs</h2>{table([*head, *(['watts'] if measured else [])], body, numbers={3, 4, 5, 6, 7, 8})}"
        "<p class='note below'>Time is wall clock in the trial, the pass over the images included where a probe made it; "
        f"features that were kept cost nothing again. {power}</p>"
    )


def _watts(cells: Sequence[Entry]) -> str:
    """Of each part that was measured the mean over time."""
    said = []
    for part in sorted({part for c in cells for part in c.watts}):
        known = [c for c in cells if part in c.watts]
        seconds_s = sum(c.seconds_s for c in known)
        if seconds_s > 0:
            said.append(f"{part} {sum(c.watts[part] * c.seconds_s for c in known) / seconds_s:.0f}")
    return ", ".join(said) or "–"
