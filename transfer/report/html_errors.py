"""The report's page on test images: measures besides the metric, the worst mistakes as pictures, and scores without
images that were upstream."""

from collections.abc import Mapping, Sequence

from transfer.measurement.prediction_measures import CALIBRATION, ORDINAL
from transfer.metric_facts import facts_of
from transfer.report.html_template import fill
from transfer.results.contamination import Cleaned, Upstream
from transfer.results.error_analysis import CellMeasures, cell_of_mistakes, thumbnail, worst_mistakes
from transfer.results.scorecard import cell_name
from transfer.results.sweep_results import Findings

NUM_PICTURES = 12


def measures(rows: Sequence[CellMeasures]) -> str:
    """Calibration, selective accuracy and, where classes are ordered, their measures: a line a cell."""
    shown = [m for m in (*CALIBRATION, *ORDINAL) if any(m in row.estimates for row in rows)]
    facts = {m: facts_of(m) for m in shown}
    return fill("measures.html.j2", rows=rows, facts=facts) if rows else ""


def mistakes(findings: Findings) -> str:
    """Of each task, pictures that its best pretrained cell gets wrong with every seed and is sure about."""
    tasks = []
    for task in dict.fromkeys(cell.task for cell in sorted(findings.finals, key=lambda c: c.task)):
        entries = cell_of_mistakes(findings, task)
        if not entries:
            continue
        data = findings.datasets[task]
        pictures = []
        if not isinstance(data, str):
            predicted = [found for entry in entries if (found := findings.predicted_classes(entry)) is not None]
            for one in worst_mistakes(predicted, NUM_PICTURES):
                labels = (one.predicted, one.label)
                called, right = (data.classes[i] if i < len(data.classes) else str(i) for i in labels)
                pictures.append((one, called, right, thumbnail(data, one.sample)))
        tasks.append((entries[0], cell_name(entries[0]), data if isinstance(data, str) else "", pictures))
    return fill("mistakes.html.j2", tasks=tasks) if tasks else ""


def overlaps(findings: Findings, clean: Mapping[str, tuple[Upstream, list[Cleaned]]]) -> str:
    """By task: how many test images were upstream, and each cell's score with and without them."""
    if not clean:
        return ""
    cells = findings.by_cell()
    titles = {cell.task: cell.task_title for cell in reversed(findings.finals)}
    tasks = [
        (titles[task], upstream, [(row, cells[row.cell][0]) for row in rows])
        for task, (upstream, rows) in sorted(clean.items())
    ]
    return fill("overlap.html.j2", tasks=tasks)
