"""Whether the number of a final trial is what its records say."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from pipeline.errors import UserError
from pipeline.storage import objects
from transfer.measurement import predictions
from transfer.results.scorecard import cell_name
from transfer.results.sweep_results import Findings
from transfer.sweep.entry import LedgerEntry


def check_lineage(findings: Findings) -> None:
    """UserError for a final trial whose number is not what its records say: a record is gone or was changed, or the predictions
    give another number. Its origin lost, a number is not shown as if it had one.

    Trials of versions that wrote no such records name none.
    """
    with ThreadPoolExecutor(8) as pool:  # an object store takes its time for each of hundreds of small objects
        problems = pool.map(lambda entry: _problem(findings, entry), findings.finals)
        for entry, problem in zip(findings.finals, problems, strict=True):
            if problem:
                trial = objects.join(findings.home[entry.digest].url, "trials", f"{entry.digest}.json")
                raise UserError(
                    f"{cell_name(entry)}, seed {entry.seed}: {problem}; restore it, or delete the trial {trial} and run the "
                    "sweep again"
                )


def _problem(findings: Findings, entry: LedgerEntry) -> str:
    home = findings.home[entry.digest]
    record = objects.join(home.url, "selection", f"{entry.selection}.json")
    if entry.selection and entry.selection not in home.selections:
        return f"its record {record} is gone"
    if entry.config_digest and entry.digest not in home.predicted:
        return f"its record {predictions.url_of(home.url, entry.digest)} is gone"
    if entry.config_digest and entry.digest not in home.openings:
        return f"its record {objects.join(home.url, 'openings', entry.digest + '-*.json')} is gone"
    if entry.selection and home.selections[entry.selection]["hyperparameters"] != entry.hyperparameters:
        return f"its hyperparameters are not those that its record {record} has selected"
    sealed = {opening.selection_sha256 for opening in home.openings.get(entry.digest, [])}
    if sealed and home.sealed.get(entry.selection, "") not in sealed:
        return f"its record {record} is not the one for which the test split was opened"
    found = findings.predictions(entry)
    other = predictions.contradiction(asdict(entry), found) if found is not None else ""
    return other and f"{other} ({predictions.url_of(home.url, entry.digest)})"
