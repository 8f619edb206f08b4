"""Many sweeps as one page that sorts and filters, and as a CSV file with timm's columns.

What was measured by one protocol on the same data is ranked; nothing else is compared. The page stands alone as a scorecard's
does: its script and style are let in by their digests, and its links are the sweeps' own pages.
"""

import os
import posixpath
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import UserError
from pipeline.models.backbone import make, without_memory
from pipeline.storage import objects
from transfer.report.html_page import check_links, policy
from transfer.report.html_template import fill
from transfer.report.scorecard_csv import csv_text
from transfer.results.scorecard import Row, scorecard, shots_text, with_extra_metrics
from transfer.results.sweep_results import Findings, load_findings
from transfer.results.trial_records import check_lineage
from transfer.sweep.cells import sweep_of
from transfer.sweep.sources import Backbone

INFO = "sweep.json"
MAX_MODULES = 20_000
"""Of a network whose parameters are counted; the largest of timm's have a few thousand."""
CSV_FIELDS = (
    *("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation"),
    *("dataset", "method", "shots", "metric", "value", "low", "high", "n", "sweep"),
)
"""timm's (its `results/*.csv`), then what a transfer is known by."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One row of a sweep's scorecard, among those of all sweeps."""

    row: Row
    sweep: str
    name: str
    """The sweep's, for people: its place below the folder that was searched."""
    started_s: float
    model: str
    link: str
    """To the sweep's page, from this one; "" where there is none, or no relative way to it."""
    data_digest: str
    weights: str
    """Digest of the source's weights."""
    source: Backbone | None
    """None of a sweep of an earlier version."""
    rank: int = 0
    num_ranked: int = 0
    """Among rows by the same protocol on the same data."""

    @property
    def group(self) -> tuple[str, ...]:
        row = self.row
        return row.task, row.metric, row.method, str(row.shots), row.protocol_digest, self.data_digest


@dataclass(frozen=True)
class Board:
    places: list[Place]
    passed_over: dict[str, str] = field(default_factory=dict)
    """Sweeps that are not shown, and why."""
    num_sweeps: int = 0

    @property
    def num_shown(self) -> int:
        """Sweeps."""
        return self.num_sweeps - len(self.passed_over)


def find_sweeps(folders: Sequence[str]) -> list[str]:
    """Every sweep below the folders. UserError where there is none."""
    urls = [url for folder in folders for url in objects.list_urls(folder, INFO)]
    found = [folder for folder, _, name in (url.rpartition("/") for url in urls) if name == INFO]
    if not found:
        raise UserError(f"there is no sweep below {', '.join(folders)}; give a folder or bucket that holds sweeps")
    return list(dict.fromkeys(found))


def board(folders: Sequence[str], out: str, tell: Callable[[int, int], None] = lambda done, total: None) -> Board:
    """The sweeps below the folders, for a page in `out`. A sweep that does not verify is passed over, with the reason.

    Raises:
        UserError: no sweep there.
    """
    places: list[Place] = []
    passed: dict[str, str] = {}
    sweeps = find_sweeps(folders)
    for num, sweep in enumerate(sweeps, start=1):
        try:
            findings = load_findings(sweep)
            check_lineage(findings)
            places += _places(findings, sweep, out, folders)
        except UserError as error:
            passed[sweep] = str(error)
        tell(num, len(sweeps))
    return Board(_ranked(places), passed, len(sweeps))


def _places(findings: Findings, sweep: str, out: str, folders: Sequence[str]) -> list[Place]:
    (folder,) = findings.folders
    try:
        sources = {one.name: one for one in sweep_of(sweep).sources}
    except UserError:
        sources = {}
    first = {name: entries[0] for name, entries in findings.by_cell().items()}
    started_s = folder.sweep.get("started_s")
    return [
        Place(
            row=row,
            sweep=sweep,
            name=_name(sweep, folders),
            started_s=started_s if isinstance(started_s, int | float) else 0.0,
            model=row.backbone or str(folder.sweep.get("model", "")),
            link=_link(sweep, out),
            data_digest=first[row.pretrained_cell or row.scratch_cell].data_digest,
            weights=first[row.pretrained_cell or row.scratch_cell].checkpoint_digest,
            source=sources.get(row.backbone) or (next(iter(sources.values())) if len(sources) == 1 else None),
        )
        for row in with_extra_metrics(scorecard(findings.cells, findings.damages))
    ]


def _name(sweep: str, folders: Sequence[str]) -> str:
    above = max((f.rstrip("/") for f in folders if sweep.startswith(f.rstrip("/") + "/")), key=len, default="")
    return sweep.removeprefix(f"{above}/") if above else sweep


def _link(sweep: str, out: str) -> str:
    """From a page in `out` to the sweep's, as a relative address."""
    page = objects.join(sweep, "report", "scorecard.html")
    if not objects.exists(page):
        return ""
    if objects.is_local(sweep) and objects.is_local(out):
        path = os.path.relpath(objects.local_path(page).absolute(), objects.local_path(out).absolute())
        return urllib.parse.quote(os.fsencode(path).replace(os.sep.encode(), b"/"))
    (scheme, _, there), (other, _, here) = page.partition("://"), out.partition("://")
    if scheme != other or there.partition("/")[0] != here.partition("/")[0]:
        return ""
    return urllib.parse.quote(posixpath.relpath(there, here))


def _ranked(places: Sequence[Place]) -> list[Place]:
    """With ranks; one result that several sweeps hold counts once."""
    groups: dict[tuple[str, ...], set[tuple[str, float]]] = defaultdict(set)
    for place in places:
        if place.row.pretrained is not None:
            groups[place.group].add((place.weights, place.row.pretrained.mean))

    def ranked(place: Place) -> Place:
        value, others = place.row.pretrained, groups[place.group]
        if value is None or len(others) < 2:
            return place
        larger = place.row.facts.larger_is_better
        better = sum(other > value.mean if larger else other < value.mean for _, other in others)
        return replace(place, rank=better + 1, num_ranked=len(others))

    return sorted(map(ranked, places), key=_order)


def _order(place: Place) -> tuple[object, ...]:
    """Shots by number: a group holds them as text."""
    row = place.row
    return row.task_title, row.metric, row.method, row.shots, place.group, place.rank, place.model


def render(found: Board) -> str:
    """The page. RuntimeError if it held what it may not."""
    chosen = {
        "task": sorted({p.row.task_title for p in found.places}),
        "method": sorted({p.row.method for p in found.places}),
        "shots": list(dict.fromkeys(shots_text(p.row.shots) for p in sorted(found.places, key=lambda p: p.row.shots))),
        "model": sorted({p.model for p in found.places}),
    }
    page = fill("leaderboard.html.j2", board=found, chosen=chosen, policy=policy(script="leaderboard.js"))
    check_links(str(page), own=["<script>", *(f"href of <a>: {p.link}" for p in found.places if p.link)])
    return f"{page}\n"


def to_csv(places: Sequence[Place]) -> str:
    """A line for each row, in the form of timm's tables of results; shares in per cent there, as stored in `value`."""
    lines: list[Sequence[object]] = [CSV_FIELDS]
    facts = {(p.sweep, p.model): _facts(p.source) for p in {(q.sweep, q.model): q for q in places}.values()}
    top5 = {_but_metric(p): p.row for p in places if p.row.metric == "top5"}
    for place in places:
        row = place.row
        if row.pretrained is None:
            continue
        line: dict[str, object] = {"model": place.model, **facts[place.sweep, place.model]}
        for name, of in (("top1", row if row.metric == "top1" else None), ("top5", top5.get(_but_metric(place)))):
            if of is not None and of.pretrained is not None:
                line[name] = f"{100 * of.pretrained.mean:.3f}"
                line[f"{name}_err"] = f"{100 - 100 * of.pretrained.mean:.3f}"
        line |= {"dataset": row.task, "sweep": place.sweep}
        line |= {name: getattr(row, name) for name in ("method", "shots", "metric")}
        line |= {"value": row.pretrained.mean} | {name: getattr(row.pretrained, name) for name in ("low", "high", "n")}
        lines.append([line.get(name) for name in CSV_FIELDS])
    return csv_text(lines)


def _but_metric(place: Place) -> tuple[str, ...]:
    """Equal for what one model reached in one column by several metrics."""
    task, _, *rest = place.group
    return place.sweep, place.model, task, *rest


def _facts(source: Backbone | None) -> dict[str, object]:
    if source is None:
        return {}
    augment, num_parameters = source.augment, _num_parameters(source)
    return {
        "img_size": augment.evaluation_px,
        "crop_pct": round(augment.eval_crop, 4),
        "interpolation": augment.interpolation,
        "param_count": "" if num_parameters is None else f"{num_parameters / 1e6:.2f}",
    }


def _num_parameters(source: Backbone) -> int | None:
    """With the head of its own classes; None where this version, or timm's here, makes no such network."""
    try:
        with without_memory(MAX_MODULES, source.model):
            model = make(source.model.partition("@")[0], source.classes or 1000, source.options)
    except UserError:
        return None
    return sum(p.numel() for p in model.parameters())
