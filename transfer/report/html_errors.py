"""The report's page on test images: the worst mistakes as pictures, and scores without images that were upstream."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data.format.manifest import Manifest
from transfer.report.html_elements import esc, link, plural, public, table, table_row, value_with_half
from transfer.results.contamination import Cleaned, Upstream
from transfer.results.error_analysis import Mistake, cell_of_mistakes, thumbnail, worst_mistakes
from transfer.results.scorecard import cell_name, shots_phrase, shots_text, start_of
from transfer.results.sweep_results import Findings
from transfer.sweep.ledger import Entry

NUM_PICTURES = 12


def mistakes(findings: Findings) -> str:
    """Of each task, pictures that its best pretrained cell gets wrong with every seed and is sure about."""
    out = ""
    for task in dict.fromkeys(cell.task for cell in sorted(findings.finals, key=lambda c: c.task)):
        entries = cell_of_mistakes(findings, task)
        if not entries:
            continue
        predicted = [p for e in entries if (p := findings.predictions(e)) is not None]
        data = findings.datasets[task]
        worst = worst_mistakes(predicted, NUM_PICTURES)
        first = entries[0]
        cell = link(
            f"{esc(first.method_title or first.method)}, {esc(shots_phrase(first.shots))}", "cell", cell_name(first)
        )
        out += f"<h3 class=sub>{esc(first.task_title)} <span class=half>{cell}</span></h3>"
        if isinstance(data, str):
            out += f"<p class=note>No pictures: {esc(public(data))}.</p>"
        elif not worst:
            out += "<p class=note>No test image is wrong with every seed.</p>"
        else:
            out += f"<div class=pictures>{''.join(_picture(data, one, first) for one in worst)}</div>"
    if not out:
        return ""
    note = (
        "Test images that each seed of the task's best pretrained cell gets wrong, the highest mean confidence first; every one "
        "of these test splits had been opened for a final trial. Above what it is called and how surely, below what it is."
    )
    return f"<h2>The worst mistakes</h2><p class=note>{note}</p>{out}"


def _picture(data: Manifest, one: Mistake, entry: Entry) -> str:
    uri = thumbnail(data, one.sample)
    called, right = (data.classes[i] if i < len(data.classes) else str(i) for i in (one.predicted, one.label))
    image = f'<img src="{uri}" alt="{esc(f"{right}, called {called}")}">' if uri else "<p class=note>not readable</p>"
    return (
        f"<figure><p><b>{esc(called)}</b> {100 * one.confidence:.0f} %</p>{image}"
        f"<p class=note>is {esc(right)} <small>#{one.sample}</small></p></figure>"
    )


def overlaps(findings: Findings, clean: Mapping[str, tuple[Upstream, list[Cleaned]]]) -> str:
    """By task: how many test images were upstream, and each cell's score with and without them."""
    cells = findings.by_cell()
    out = ""
    for task, (upstream, rows) in sorted(clean.items()):
        title = next(cell.task_title for cell in findings.finals if cell.task == task)
        num = len(upstream.samples)
        out += (
            f"<h3 class=sub>{esc(title)}</h3><p>{num:,} of {plural(upstream.num_test, 'test image')} "
            f"({100 * upstream.share:.2f} %) are upstream, too <span class=half>({esc(public(upstream.file))})</span>.</p>"
        )
        body = ""
        for row in rows:
            first = cells[row.cell][0]
            start = start_of(first)
            body += table_row(
                [
                    link(f"{esc(first.method_title or first.method)}", "cell", row.cell),
                    esc(start),
                    esc(shots_text(first.shots)),
                    *(value_with_half(side) for side in (row.whole, row.without, row.only)),
                    value_with_half(row.change, sign=True),
                ],
                numbers={2, 3, 4, 5, 6},
            )
        head = [
            "method",
            "start",
            "shots",
            "all test images, %",
            "without upstream ones",
            "upstream ones alone",
            "change, points",
        ]
        if not num:
            continue
        kept = table(head, body, numbers={2, 3, 4, 5, 6})
        out += (
            kept
            if body
            else "<p class=note>Its scores cannot be told from predictions; the metric needs all scores.</p>"
        )
    if not out:
        return ""
    note = (
        "Scores recomputed from the predictions of the final trials: nothing was trained again. Upstream images are those that "
        "<code>normfree data overlap</code> found in the set that the network was pretrained on."
    )
    return f"<h2>Overlap with upstream</h2><p class=note>{note}</p>{out}"
