"""What a model card shows of a transfer sweep."""

from orchestration.registry.version_facts import scorecard_rows
from pipeline.checkpoint import load
from pipeline.export.card_facts import CardFacts, TaskResult
from transfer.results.scorecard import Row, difference_text, shots_phrase, value_text, with_extra_metrics
from transfer.results.scorecard_table import notes


def card_facts(checkpoint_url: str, license: str, sweep: str | None) -> CardFacts:
    """The licence that the user gave, and the scorecard of a sweep of this checkpoint.

    Raises:
        UserError: no identifier of a licence, no sweep there, or one of other weights.
    """
    facts = CardFacts(license=license)
    if not sweep:
        return facts
    rows = scorecard_rows(sweep, load.resolve(checkpoint_url, load.default_cache()))
    results = tuple(found for row in with_extra_metrics(rows) if (found := _result(row)))
    return CardFacts(license=license, results=results, notes=tuple(notes(rows)))


def _result(row: Row) -> TaskResult | None:
    if row.pretrained is None:
        return None
    return TaskResult(
        task=row.task,
        task_title=row.task_title,
        method=row.method_title or row.method,
        shots=shots_phrase(row.shots),
        metric=row.metric,
        metric_title=row.facts.short,
        value=row.facts.scale * row.pretrained.mean,
        unit=row.facts.unit,
        texts=(
            value_text(row.pretrained, row.facts),
            value_text(row.scratch, row.facts),
            difference_text(row.gain, row.facts),
        ),
        verdict=row.damage or row.verdict,
    )
