"""What sweeps' folders say, read for a report: one folder, or several side by side.

Where a cell is in several folders (the same from-scratch baseline, mostly), the folder with most of its seeds gives it whole: two
folders' seeds are never mixed in one mean. What was measured by another protocol is refused, with what differs.
"""

import functools
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.measurement import predictions
from transfer.protocol.sealed_splits import Opening, openings, read_selection, record_sha256
from transfer.results.replay import Played, play_again
from transfer.results.scorecard import cell_name, column_order, refuse_mixture
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.ledger import Ledger


@dataclass(frozen=True)
class Folder:
    """One sweep."""

    url: str
    entries: list[LedgerEntry]
    selections: dict[str, dict[str, Any]]
    """By the name of the record, which is the cell's."""
    sweep: dict[str, Any]
    """sweep.json; {} if it is not there."""
    predicted: frozenset[str] = frozenset()
    """Digests of the trials whose predictions are there."""
    openings: dict[str, list[Opening]] = field(default_factory=dict)
    """Of test splits, by the trial's digest."""
    sealed: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each selection record, by its name."""

    @property
    def plan(self) -> dict[str, Any]:
        """As sweep.json holds it (`transfer.sweep.cells.Sweep.plain`); {} of an earlier version."""
        return self.sweep.get("plan") or {}

    @property
    def suite(self) -> dict[str, Any]:
        return self.plan.get("suite") or {}

    def method(self, name: str) -> dict[str, Any]:
        """Settings of a method of the suite."""
        return (self.suite.get("methods") or {}).get(name) or {}


@dataclass(frozen=True)
class Findings:
    """What a report is about."""

    folders: tuple[Folder, ...]
    cells: list[LedgerEntry]
    """Trials, each cell from one folder."""
    home: dict[str, Folder]
    """By the trial's digest."""
    num_shared: int = 0
    """Cells that were in several folders."""
    data_root: str = ""
    """Where datasets lie now, if not where they lay then."""

    @property
    def finals(self) -> list[LedgerEntry]:
        """Those with a value."""
        return [cell for cell in self.cells if cell.kind == "final" and cell.is_ok]

    def by_cell(self) -> dict[str, list[LedgerEntry]]:
        """The final trials with a value, by cell: cells by task, method, number of images and start; trials by seed."""
        found: dict[str, list[LedgerEntry]] = defaultdict(list)
        for cell in sorted(self.finals, key=lambda c: (*column_order(c), c.init, c.backbone, c.seed)):
            found[cell_name(cell)].append(cell)
        return dict(found)

    def selection(self, entry: LedgerEntry) -> dict[str, Any]:
        return self.home[entry.digest].selections.get(cell_name(entry), {})

    def predictions(self, entry: LedgerEntry) -> dict[str, np.ndarray] | None:
        """`transfer.measurement.predictions`; None where the trial kept none."""
        home = self.home[entry.digest]
        return predictions.read(home.url, entry.digest) if entry.digest in home.predicted else None

    def predicted_classes(self, entry: LedgerEntry) -> dict[str, np.ndarray] | None:
        """`predictions`, where they name one class an image."""
        found = self.predictions(entry)
        return found if predictions.names_classes(found) else None

    @functools.cached_property
    def damages(self) -> dict[str, str]:
        """Cells whose selection was made while a candidate had no result, as earlier versions did; a sentence for each."""
        return {name: configured for folder in self.folders for name, configured in _damages(folder).items()}

    @functools.cached_property
    def played(self) -> list[Played]:
        """The decisions of each folder, played again."""
        return [played(folder) for folder in self.folders]

    @functools.cached_property
    def datasets(self) -> dict[str, Manifest | str]:
        """By task: the dataset that the trials were measured on, or why it cannot be read."""
        first = {cell.task: cell for cell in reversed(self.finals)}
        return {task: self._open(cell) for task, cell in first.items()}

    def _open(self, cell: LedgerEntry) -> Manifest | str:
        data = cell.config.get("data")
        url = data.get("url") if isinstance(data, dict) else data
        if self.data_root or not url:
            root = self.data_root or self.home[cell.digest].plan.get("data_root")
            url = objects.join(root, cell.task) if root else None
        if not url:
            return "the sweep does not say where its data lie; name the folder with --data-root"
        try:
            found = Manifest.open(url)
        except (UserError, OSError) as error:
            return f"{error}"
        if found.digest != cell.data_digest:
            return f"the data at {url} are others now: digest {found.digest[:12]}, then {cell.data_digest[:12]}"
        return found


def played(folder: Folder, cell: str = "") -> Played:
    """`transfer.results.replay.play_again` of a sweep's folder, or of one cell's decisions in it."""
    return play_again(folder.url, {e.digest: e for e in folder.entries}, folder.suite.get("methods") or {}, cell)


def name_of_test_split(manifest: Manifest) -> str:
    """Of a task's dataset, as `transfer.protocol.tasks.open_task` has it."""
    return "test" if "test" in manifest.splits else "val"


def load_entries(sweep_url: str | os.PathLike[str]) -> list[LedgerEntry]:
    """Every finished trial of a sweep, in the order of digests. UserError if there is none, or one is no trial."""
    found = list(Ledger(os.fspath(sweep_url)).entries())
    if not found:
        raise UserError(
            f"no finished trial under {sweep_url}; give the folder that 'normfree transfer' wrote to (--out)"
        )
    return found


def load_findings(*sweep_urls: str | os.PathLike[str], data_root: str = "") -> Findings:
    """Sweeps as one.

    Raises:
        UserError: a folder without a trial; trials of one task, method and number of images that do not compare, with what
            differs between their protocols.
    """
    folders = tuple(_folder(url) for url in dict.fromkeys(os.fspath(url) for url in sweep_urls))
    if len(folders) == 1:
        own = folders[0]
        return Findings(folders, own.entries, {e.digest: own for e in own.entries}, data_root=data_root)
    _refuse_mixtures(folders)
    best: dict[tuple[str, str], list[tuple[int, Folder, list[LedgerEntry]]]] = defaultdict(list)
    for folder in folders:
        for key, part in _cells(folder).items():
            best[key].append((sum(e.kind == "final" and e.is_ok for e in part), folder, part))
    cells: list[LedgerEntry] = []
    home: dict[str, Folder] = {}
    for found in best.values():
        _, folder, part = max(found, key=lambda one: one[0])  # the first of equals
        cells += part
        home |= {e.digest: folder for e in part}
    num_shared = sum(len(found) > 1 for found in best.values())
    return Findings(folders, _named_apart(cells, home), home, num_shared, data_root)


def _folder(url: str) -> Folder:
    entries = load_entries(url)
    urls = objects.list_urls(objects.join(url, "selection"), ".json")
    found = {_stem(u): read_selection(u) for u in urls}
    about = objects.join(url, "sweep.json")
    opened: dict[str, list[Opening]] = defaultdict(list)
    for opening in openings(url):
        opened[opening.trial].append(opening)
    return Folder(
        url,
        entries,
        {name: asdict(one) for name, one in found.items()},
        asdict(Ledger(url).info()) if objects.exists(about) else {},
        frozenset(map(_stem, objects.list_urls(objects.join(url, "predictions"), ".npz"))),
        dict(opened),
        {name: record_sha256(u) for name, u in zip(found, urls, strict=True)},
    )


def _damages(folder: Folder) -> dict[str, str]:
    entries, found = {entry.digest: entry for entry in folder.entries}, {}
    for name, record in folder.selections.items():
        for candidate in record["candidates"]:
            entry = entries.get(candidate["digest"])
            if candidate["status"] != "ok" and (entry is None or entry.lacks_result):
                point = ", ".join(f"{k} {v}" for k, v in candidate["hyperparameters"].items())
                why = (entry.error if entry else None) or "its entry is gone"
                found[name] = (
                    f"selected without the candidate of {point}, which has no result ({why}); run the sweep in another folder"
                )
    return found


def _cells(folder: Folder) -> dict[tuple[str, str], list[LedgerEntry]]:
    """The trials of a folder by cell and weights, search trials with their finals."""
    found: dict[tuple[str, str], list[LedgerEntry]] = defaultdict(list)
    for entry in folder.entries:
        found[cell_name(entry), entry.checkpoint_digest or entry.backbone_digest].append(entry)
    return dict(found)


def _refuse_mixtures(folders: Iterable[Folder]) -> None:
    groups: dict[tuple[str, str, int], dict[str, tuple[Folder, list[LedgerEntry]]]] = defaultdict(dict)
    for folder in folders:
        for e in folder.entries:
            if e.kind == "final" and e.is_ok:
                groups[e.task, e.method, e.shots].setdefault(folder.url, (folder, []))[1].append(e)
    for _, parts in sorted(groups.items()):
        (first, cells), *others = parts.values()
        for folder, more in others:
            refuse_mixture(
                [*cells, *more], f"{first.url} and {folder.url} differ in " + _difference(first, folder, more[0])
            )


def _difference(a: Folder, b: Folder, entry: LedgerEntry) -> str:
    """What two sweeps state differently about the protocol of a trial, in words."""
    configured = [_configured(folder, entry) for folder in (a, b)]
    differing = [
        k for k in dict.fromkeys((*configured[0], *configured[1])) if configured[0].get(k) != configured[1].get(k)
    ]
    if differing:
        return ", ".join(f"{k} ({configured[0].get(k)} and {configured[1].get(k)})" for k in differing)
    revisions = [next((e.code_revision for e in f.entries if e.code_revision), "unknown") for f in (a, b)]
    return (
        f"what their suites do not state: the data, or the code (revisions {revisions[0][:12]} and {revisions[1][:12]})"
    )


def _configured(folder: Folder, entry: LedgerEntry) -> dict[str, Any]:
    tasks = {
        t.get("label") or t["card"].rpartition("/")[2].removesuffix(".yaml"): t for t in folder.suite.get("tasks", [])
    }
    task = tasks.get(entry.task) or {}
    method = {k: v for k, v in folder.method(entry.method).items() if k not in ("shots", "title")}
    data = {e.data_digest[:12] for e in folder.entries if e.task == entry.task}
    stated = {
        "holdout_per_class": task.get("holdout_per_class"),
        "data": ", ".join(sorted(data)),
        **{k: task.get(k) for k in ("real_labels", "v2", "also", "corruptions")},
    }
    return method | stated | {"scheduler": folder.plan.get("scheduler")}


def _named_apart(cells: list[LedgerEntry], home: dict[str, Folder]) -> list[LedgerEntry]:
    """Sources of several folders with names of their own: those that share one get digits of their digest."""
    digests: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        if cell.init == "pretrained":
            digests[_source_name(cell, home)].add(cell.checkpoint_digest)
    named = []
    for cell in cells:
        name = _source_name(cell, home)
        if cell.init == "pretrained" and len(digests[name]) > 1:
            name = f"{name} ({cell.checkpoint_digest[:6]})"
        named.append(replace(cell, backbone=name) if name != cell.backbone else cell)
    return named


def _source_name(cell: LedgerEntry, home: dict[str, Folder]) -> str:
    return cell.backbone or cell.model or str(home[cell.digest].sweep.get("model") or "backbone")


def _stem(url: str) -> str:
    return url.rpartition("/")[2].rpartition(".")[0]
