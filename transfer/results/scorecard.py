"""The rows of a scorecard: a task by a method by a source, over seeds. What does not compare is refused by name.

A source is a backbone with trained weights; its from-scratch baseline has the same architecture and preprocessing. A cell
is a source, or a baseline, at one task, method and number of images a class, with all its seeds; its name is that of its
selection record.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import UserError
from transfer.measurement.reference_values import wilson
from transfer.metric_facts import MetricFacts, facts_of
from transfer.protocol.imagenet_labels import is_extra
from transfer.protocol.method_settings import VTAB_IMAGES
from transfer.protocol.methods import METHOD_KINDS, draws_nothing
from transfer.protocol.sealed_splits import selection_name
from transfer.results.statistics import Estimate, estimate, holm, paired, verdict
from transfer.sweep.entry import LedgerEntry

METHODS = {kind: title for kind, (_, title, _) in METHOD_KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the scorecard: a task by a method at a number of images a class, for one source."""

    task: str
    task_title: str
    method: str
    method_title: str = ""
    shots: int
    metric: str
    pretrained: Estimate | None
    scratch: Estimate | None
    gain: Estimate | None
    """Pretrained minus scratch, paired by seed; its `n` is the number of pairs."""
    verdict: str
    """Corrected over the rows of the scorecard (Holm)."""
    num_failed: int
    protocol_digest: str
    backbone: str = ""
    """The source, where a table compares several."""
    baseline: str = ""
    """Digest of the architecture that the source and its from-scratch baseline share."""
    pretrained_cell: str = ""
    scratch_cell: str = ""
    """Names of the two cells; empty where there is none."""
    values: tuple[dict[int, float], dict[int, float]] = ({}, {})
    """By seed, of the source and of its baseline."""
    p_holm: float | None = None
    """The gain's p, corrected over the rows of the scorecard."""
    verdict_uncorrected: str = ""
    """Were this the only row."""
    baselines: dict[str, float] = field(default_factory=dict)
    """What the metric gives without a look at the images: `chance` and `majority`; {} of earlier versions."""
    damage: str = ""
    """Why its numbers are not those of an undisturbed sweep, in a sentence; shown with the row."""
    extra: tuple["Row", ...] = ()
    """The same cell by further metrics (`transfer.measurement.extra_test_sets`); no verdict over tasks counts them."""

    @property
    def column(self) -> tuple[str, str, int]:
        """Equal for rows that stand side by side."""
        return self.task, self.method, self.shots

    @property
    def n(self) -> int:
        """Pairs; without one the values that there are."""
        sides = [side.n for side in (self.pretrained, self.scratch) if side]
        return self.gain.n if self.gain else max(sides, default=0)

    @property
    def facts(self) -> MetricFacts:
        return facts_of(self.metric)

    def is_below_baseline(self, value: Estimate | None) -> bool:
        """Whether chance or the most frequent class does better."""
        if value is None or not self.baselines:
            return False
        larger = self.facts.larger_is_better
        return value.mean < max(self.baselines.values()) if larger else value.mean > min(self.baselines.values())


def cell_name(entry: LedgerEntry) -> str:
    """Of the cell that a trial belongs to: the name that `--rerun` takes."""
    key = (entry.checkpoint_digest or entry.backbone_digest or "")[:8]
    return entry.selection or selection_name(entry.task, entry.method, entry.init, entry.shots, key).rstrip("-")


def start_of(entry: LedgerEntry) -> str:
    """What a trial began from, for people: a source, or an architecture with fresh weights."""
    if entry.init == "pretrained":
        return entry.backbone or "pretrained"
    return f"{entry.backbone} from scratch" if entry.backbone else "from scratch"


def scorecard(cells: Iterable[LedgerEntry], damages: Mapping[str, str] | None = None) -> list[Row]:
    """One row for each task, method, number of images a class and source, from the final trials. Failed ones count as failed.

    `damages`: what is known of cells besides, by their names (`transfer.results.sweep_results.Findings.damages`).

    UserError where trials of one task, method and number of images do not compare: different protocols or data, one source
    with different checkpoints, or a seed twice.
    """
    groups: dict[tuple[str, str, int], list[LedgerEntry]] = defaultdict(list)
    for cell in cells:
        if cell.kind == "final":
            groups[cell.task, cell.method, cell.shots].append(cell)
    rows = []
    for key in sorted(groups, key=lambda k: column_order(groups[k][0])):
        refuse_mixture(groups[key])
        for name, part in _by_source(groups[key]).items():
            rows.append(replace(_row(part, name), damage=_damage(part, damages or {})))
    return corrected(rows)


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows, and their further metrics, with verdicts corrected over all of them."""
    lines = with_extra_metrics(rows)
    judged = iter(
        replace(line, p_holm=p, verdict=verdict(line.gain, p, larger_is_better=line.facts.larger_is_better))
        for line, p in zip(lines, holm([line.gain.p if line.gain else None for line in lines]), strict=True)
    )
    return [replace(next(judged), extra=tuple(next(judged) for _ in row.extra)) for row in rows]


def column_order(entry: LedgerEntry) -> tuple[str, int, str, float]:
    """Sorts by task, then by method from the cheapest probe to the dearest fine-tuning, then by number of images."""
    order, kind = list(METHODS), entry.method_kind or entry.method
    return entry.task, order.index(kind) if kind in order else len(order), entry.method, shots_order(entry.shots)


def refuse_mixture(cells: Sequence[LedgerEntry], why: str = "") -> None:
    """UserError if these trials were measured by different protocols, metrics, or on different data.

    Args:
        why: what is known about the difference, for the message.
    """
    good = [cell for cell in cells if cell.is_ok]
    for name, values in (
        ("protocols", {c.protocol_digest for c in good}),
        ("data", {c.data_digest for c in good}),
        ("metrics", {c.metric for c in good}),
    ):
        if len(values) > 1:
            listed = ", ".join(sorted(value[:12] for value in values))
            raise UserError(
                f"{_where(good[0])}: trials of different {name} ({listed}) do not compare in one table"
                f"{f': {why}' if why else ''}; report them one by one, or run the sweep that you mean into a folder of its own"
            )


def _by_source(cells: list[LedgerEntry]) -> dict[str, list[LedgerEntry]]:
    """The trials of each source with those of its from-scratch baseline, in the order of names."""
    baselines: dict[str, str] = {c.backbone: c.backbone_digest for c in cells if c.init == "pretrained"}
    if not baselines:  # nothing was pretrained: each network stands for itself
        return {name: [c for c in cells if c.backbone == name] for name in sorted({c.backbone for c in cells})}
    if len(baselines) < 2:
        return {next(iter(baselines), ""): cells}
    return {
        name: [
            c for c in cells if (c.backbone == name if c.init == "pretrained" else c.backbone_digest == baselines[name])
        ]
        for name in sorted(baselines)
    }


def with_extra_metrics(rows: Iterable[Row]) -> list[Row]:
    """Each row, followed by the same trials by further metrics."""
    return [line for row in rows for line in (row, *row.extra)]


def _row(cells: list[LedgerEntry], backbone: str) -> Row:
    further = list(dict.fromkeys(name for cell in cells for name in cell.metrics if is_extra(name)))
    main, *extra = (_row_by(cells, backbone, name) for name in ("", *further))
    return replace(main, extra=tuple(extra))


def _row_by(cells: list[LedgerEntry], backbone: str, name: str) -> Row:
    """By the trials' own metric, or by another one that they hold."""
    first = next((c for c in cells if c.init == "pretrained"), cells[0])
    good = [cell for cell in cells if cell.is_ok]
    digests = {str(c.checkpoint_digest) for c in good if c.init == "pretrained"}
    if len(digests) > 1:
        listed = ", ".join(sorted(digest[:12] for digest in digests))
        raise UserError(
            f"{_where(first)}: trials of different checkpoints ({listed}) do not compare in one row; "
            "run the sweep that you mean into a folder of its own (--out)"
        )
    sides: dict[str, dict[int, float]] = {"pretrained": {}, "scratch": {}}
    names = {"pretrained": "", "scratch": ""}
    for cell in sorted(good, key=lambda c: c.seed):
        side = sides.setdefault(cell.init, {})
        if cell.seed in side:
            raise UserError(
                f"{_where(first)}: seed {cell.seed} of {cell.init} is there twice (once as {cell.digest[:12]}); "
                "remove the trial file that does not belong to this sweep"
            )
        assert cell.value is not None
        side[cell.seed] = cell.metrics[name] if name else cell.value
        names[cell.init] = cell_name(cell)
    one = next(
        (c for c in good if c.init == "pretrained" and draws_nothing(c.method_kind or c.method, c.init, c.shots)), None
    )
    known, facts = sides["pretrained"], facts_of(name or first.metric)
    if one is not None:  # one value stands against each of the from-scratch networks
        (fixed,) = {known[min(known)]}
        sides["pretrained"], known = {min(known): fixed}, dict.fromkeys(sides["scratch"], fixed)
    gain = paired(known, sides["scratch"])
    return Row(
        task=first.task,
        task_title=first.task_title,
        method=first.method,
        method_title=first.method_title or METHODS.get(first.method, first.method),
        shots=first.shots,
        metric=name or first.metric,
        pretrained=_estimated(good, "pretrained", sides, name, facts) if one is None else _of_test_images(one, name),
        scratch=_estimated(good, "scratch", sides, name, facts),
        gain=gain,
        verdict=(alone := verdict(gain, gain.p if gain else None, larger_is_better=facts.larger_is_better)),
        verdict_uncorrected=alone,
        baselines={} if name else next((c.baselines for c in good if c.baselines), {}),
        num_failed=len(cells) - len(good),
        protocol_digest=first.protocol_digest,
        backbone=backbone,
        baseline=first.backbone_digest,
        pretrained_cell=names["pretrained"],
        scratch_cell=names["scratch"],
        values=(sides["pretrained"], sides["scratch"]),
    )


def _estimated(
    good: list[LedgerEntry], init: str, sides: dict[str, dict[int, float]], name: str, facts: MetricFacts
) -> Estimate | None:
    """Over seeds; of one seed with the interval of its test images where that is kept."""
    mine = [cell for cell in good if cell.init == init]
    if len(mine) == 1 and mine[0].test_interval is not None:
        return _of_test_images(mine[0], name)
    return estimate(list(sides[init].values()), within=facts.within)


def _of_test_images(entry: LedgerEntry, name: str) -> Estimate:
    """The one value of a cell where nothing is drawn, with the interval of its test images as far as that is kept."""
    value = entry.metrics[name] if name else float(entry.value or 0.0)
    if entry.test_interval is not None and not name:
        return Estimate(value, 1, **entry.test_interval)
    if facts_of(name or entry.metric).counts_images and not name:
        return Estimate(value, 1, *wilson(value, entry.num_test), "wilson")
    return Estimate(value, 1)


def _damage(cells: Iterable[LedgerEntry], damages: Mapping[str, str]) -> str:
    """What cells of a row lack: their own final trials, or the results that their choice should follow from."""
    found = {f"{start_of(cell)}: {damages[cell_name(cell)]}" for cell in cells if cell_name(cell) in damages}
    found |= {f"{start_of(cell)}: {cell.error}" for cell in cells if cell.lacks_result}
    return "; ".join(sorted(found))


def _where(entry: LedgerEntry) -> str:
    return f"{entry.task}, {entry.method}, {shots_phrase(entry.shots)}"


def shots_order(shots: int) -> float:
    """Sorts numbers of images a class, with "all" and VTAB's thousand at the end."""
    return shots if shots > 0 else float("inf")


def shots_text(shots: int) -> str:
    return str(shots) if shots > 0 else "VTAB" if shots == VTAB_IMAGES else "all"


def shots_phrase(shots: int) -> str:
    if shots > 0:
        return f"{shots} image{'s' * (shots != 1)} a class"
    return "VTAB's 1,000 images" if shots == VTAB_IMAGES else "all images"


def value_text(value: Estimate | None, facts: MetricFacts) -> str:
    """72.4 [70.6, 74.1] in the metric's unit; one drawn value has no interval, none is a dash."""
    if value is None:
        return "-"
    number = facts.text(value.mean)
    return (
        number
        if value.low is None or value.high is None
        else f"{number} [{facts.text(value.low)}, {facts.text(value.high)}]"
    )


def difference_text(value: Estimate | None, facts: MetricFacts) -> str:
    """+2.4 ± 1.8 in the unit of the metric's differences."""
    if value is None:
        return "-"
    number = facts.text(value.mean, sign=True)
    return number if value.half_width is None else f"{number} ± {facts.text(value.half_width)}"
