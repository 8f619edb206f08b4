"""A cell of a scorecard, run again: does its number come out again?

Its final trials run from the sweep's plan, the recorded selection and the recorded checkpoint, into a temporary folder: features
are extracted again, nothing is written to the sweep's folder. What would make it another measurement (other data, weights,
protocol or settings than recorded) is refused or reported.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pipeline import places
from pipeline.errors import UserError
from pipeline.models.backbone import find_origin
from pipeline.storage import objects
from transfer.metric_facts import facts_of
from transfer.protocol.methods import draws_nothing
from transfer.protocol.sealed_splits import read_selection, selection_url
from transfer.results.scorecard import cell_name
from transfer.results.statistics import Estimate, estimate
from transfer.results.sweep_results import Folder, played
from transfer.sweep.cells import Cell, Sweep, plan, sweep_of
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.probe_job import run_probes
from transfer.sweep.trials import run_finetune

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Rerun:
    """A recorded cell and its second run."""

    cell: str
    recorded: Estimate
    again: Estimate
    tolerance: float
    """One test image: what rounding on another machine may turn around where seeds agree exactly."""
    differences: tuple[str, ...]
    """What was not the same as recorded, and decisions of its search that do not follow from their numbers, in words; they do
    not decide the verdict."""

    @property
    def lands(self) -> bool:
        """Whether the new mean lies in the recorded interval."""
        low, high = self.recorded.low, self.recorded.high
        assert low is not None and high is not None
        return low - self.tolerance <= self.again.mean <= high + self.tolerance


def rerun(folder: Folder, name: str, *, data_root: str = "", tell: Tell = lambda line: None) -> Rerun:
    """Run the final trials of the cell `name` of a sweep again, one after another, in this process.

    Args:
        folder: of `transfer.results.sweep_results.load_findings`.
        name: the cell's, or the first characters of one cell's name.
        data_root: where the datasets lie now; "" = where they lay then.
        tell: called with a line for each trial that is over.
    Raises:
        UserError: no such cell; a cell of one seed, which has no interval; data, weights or a protocol other than recorded; or a
            trial that failed.
    """
    entries = _entries(folder, name)
    first = entries[0]
    cell = cell_name(first)
    recorded = estimate([float(e.value or 0.0) for e in entries], within=facts_of(first.metric).within)
    assert recorded is not None
    all_equal = recorded.n > 1 and recorded.low is None
    if all_equal or draws_nothing(first.method_kind or first.method, first.init, first.shots):
        recorded = replace(recorded, low=recorded.mean, high=recorded.mean)  # the same number, up to an image
    if recorded.half_width is None:
        raise UserError(f"{cell} has one seed and so no interval to land in; extend the sweep with --seeds 3 first")
    sweep = sweep_of(folder.url)
    sweep = replace(sweep, data_root=data_root) if data_root else sweep
    planned = _planned(sweep, first)
    _check_weights(first)
    with places.temporary_folder("rerun") as path:
        out = str(path)
        suite = replace(sweep.suite, num_seeds=max(e.seed for e in entries) + 1)
        temporary = replace(sweep, out=out, suite=suite)
        record = selection_url(folder.url, cell)
        read_selection(record)
        objects.write_bytes(selection_url(out, cell), objects.read_bytes(record))
        found = _run(temporary, planned, entries, tell)
    again = estimate([float(e.value or 0.0) for e in found], within=facts_of(first.metric).within)
    assert again is not None
    differences = (*_differences(entries, found), *played(folder, cell).wrong)
    return Rerun(cell, recorded, again, 1 / max(1, first.num_test), differences)


def _entries(folder: Folder, name: str) -> list[LedgerEntry]:
    """The recorded finals of the cell, in the order of seeds."""
    finals = [e for e in folder.entries if e.kind == "final" and e.is_ok]
    names = sorted({cell_name(e) for e in finals})
    matches = [name] if name in names else [n for n in names if n.startswith(name)]
    if len(matches) != 1:
        near = [n for n in names if name.split("-")[0] in n] or names
        listed = ", ".join((matches or near)[:12])
        raise UserError(f"{'several cells are' if matches else 'no cell is'} called {name!r}; name one of {listed}")
    return sorted((e for e in finals if cell_name(e) == matches[0]), key=lambda e: e.seed)


def _planned(sweep: Sweep, entry: LedgerEntry) -> Cell:
    """The cell as the sweep's plan gives it now. UserError if that is another measurement than the recorded one."""
    cells, not_run = plan(sweep)
    found = next((cell for cell in cells if cell.name == cell_name(entry)), None)
    if found is None:
        for row in not_run:
            if row["task"] == entry.task and not row["method"]:
                raise UserError(f"{cell_name(entry)} cannot be run again: its task is {row['reason']}")
        raise UserError(f"the plan of {sweep.out} does not have {cell_name(entry)} any more; it was cut from the suite")
    trial = found.any_trial
    for what, now, then in (
        ("data", trial.data_digest, entry.data_digest),
        ("the protocol", trial.protocol_digest, entry.protocol_digest),
        ("weights", trial.checkpoint_digest, entry.checkpoint_digest),
        ("the architecture", trial.backbone_digest, entry.backbone_digest),
    ):
        if now != then:
            raise UserError(
                f"{cell_name(entry)} cannot be run again: {what} of digest {then[:12]} made it, and here is {now[:12]}; "
                f"restore what it was measured with (code {entry.code_revision[:12] or 'unknown'})"
            )
    return found


def _check_weights(entry: LedgerEntry) -> None:
    if entry.init == "pretrained":
        now = find_origin(entry.checkpoint_url).digest
        if now != entry.checkpoint_digest:
            raise UserError(
                f"{entry.checkpoint_url} holds other weights now (digest {now[:12]}, then {entry.checkpoint_digest[:12]}); "
                "restore the checkpoint to run the cell again"
            )


def _run(sweep: Sweep, cell: Cell, entries: list[LedgerEntry], tell: Tell) -> list[LedgerEntry]:
    """The same seeds again, each written to the ledger of the temporary folder."""
    wanted = {e.seed: e for e in entries}
    trials = [t for t in cell.finals(dict(entries[0].hyperparameters), sweep.suite.num_seeds) if t.seed in wanted]
    found = []
    fresh = run_probes(sweep, [cell]) if cell.is_probe else (run_finetune(sweep, t, lambda row: None) for t in trials)
    for entry in fresh:
        assert entry is not None
        if entry.kind != "final" or entry.seed not in wanted:
            continue
        if not entry.is_ok:
            raise UserError(f"{cell.name}, seed {entry.seed}, failed when it was run again: {entry.error}")
        then = wanted[entry.seed].value
        tell(f"seed {entry.seed}: {entry.value:.4f}, recorded {then:.4f}, {entry.seconds_s:.0f} s")
        found.append(entry)
    return found


def _differences(then: list[LedgerEntry], now: list[LedgerEntry]) -> tuple[str, ...]:
    found = []
    for old, new in zip(then, sorted(now, key=lambda e: e.seed), strict=True):
        if old.config and old.config_digest != new.config_digest:
            fields = sorted(_changed(old.config, new.config))
            found.append(f"settings of seed {old.seed}: {', '.join(fields)}")
    if then[0].code_revision != now[0].code_revision:
        found.append(f"code: {then[0].code_revision[:12] or 'unknown'} then, {now[0].code_revision[:12]} now")
    return tuple(found)


def _changed(old: Any, new: Any, name: str = "") -> list[str]:
    """Names of the leaves in which two plain containers differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys((*old, *new))
        return [part for k in keys for part in _changed(old.get(k), new.get(k), f"{name}.{k}" if name else str(k))]
    return [] if old == new else [name]
