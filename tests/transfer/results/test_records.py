"""A number is shown as long as its records are what was written and say the same."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from tests.fuzzing import fuzz, mutants
from tests.transfer.records import edit_entry
from transfer.measurement import predictions
from transfer.report.scorecard_csv import to_csv
from transfer.report.write_report import write_report
from transfer.results.scorecard import scorecard
from transfer.results.scorecard_table import columns_of, lines_of
from transfer.results.sweep_results import load_findings
from transfer.results.trial_records import check_lineage
from transfer.sweep.ledger import Ledger

RIDGE = "digits-ridge-pretrained-5"


@pytest.fixture()
def copy(digits_sweep: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits_sweep, tmp_path / "sweep")


def a_final(sweep: Path) -> tuple[Path, dict[str, Any]]:
    """Path and content of an entry."""
    found = next(e for e in Ledger(str(sweep)).entries() if e.kind == "final" and e.selection.startswith(RIDGE))
    return sweep / "trials" / f"{found.digest}.json", dataclasses.asdict(found)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"value": 0.995, "metrics": {"top1": 0.995}}, r"value is 0\.995, and its predictions give 0\."),
        ({"metrics": {"mean_per_class": 0.5}}, r"metrics\.mean_per_class is 0\.5, and its predictions give 0\."),
        ({"num_test": 12}, r"num_test is 12, and there are 697 predictions"),
        ({"hyperparameters": {"l2": 1.0}}, "hyperparameters are not those that its record"),
    ],
)
def test_an_entry_without_a_seal_is_compared_with_its_predictions(
    copy: Path, changed: dict[str, Any], words: str
) -> None:
    path, _ = a_final(copy)
    edit_entry(path, **changed)
    with pytest.raises(UserError, match=words) as refused:
        write_report(copy, copy / "report", show=False)
    assert path.stem in str(refused.value)


def test_the_seal_of_a_selection_is_compared_with_its_openings(copy: Path) -> None:
    check_lineage(load_findings(copy))
    path = next((copy / "selection").glob(f"{RIDGE}*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "rule": "the highest"}))
    with pytest.raises(UserError, match="is not the one for which the test split was opened"):
        check_lineage(load_findings(copy))


def test_predictions_that_are_damaged_or_something_else_are_named(copy: Path) -> None:
    path = copy / "predictions" / f"{a_final(copy)[0].stem}.npz"
    whole, arrays = path.read_bytes(), predictions.read(str(copy), path.stem)
    all_right = arrays["top5"].copy()
    all_right[:, 0] = arrays["label"]
    cases: list[Callable[[], object]] = [
        lambda: path.write_bytes(whole[:-30]),
        lambda: path.write_bytes(b""),
        lambda: np.savez_compressed(path, **arrays),
        lambda: np.savez(path, **{**arrays, "label": arrays["label"].astype(object)}),
        lambda: np.savez(path, **{**arrays, "label": arrays["label"][:5]}),
        lambda: np.savez(path, **{**arrays, "confidence": arrays["confidence"] + 7}),
        lambda: np.savez(path, label=arrays["label"]),
        lambda: np.savez(path, **{**arrays, "predicted": arrays["label"]}),
        lambda: np.savez(path, **{**arrays, "predicted": arrays["label"], "top5": all_right}),
        lambda: np.savez(path, **{**arrays, "credit5": np.ones_like(arrays["credit5"])}),
    ]
    for write in cases:
        write()
        with pytest.raises(UserError, match=rf"{path.name}.*; restore it, or delete"):
            check_lineage(load_findings(copy))


def test_equal_scores_at_the_top_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 3, (200, 7)).astype(float), rng.integers(0, 7, 200)
    predictions.write(str(tmp_path), "d", np.arange(200), scores, labels)
    numbers = predictions.all_metrics(scores, labels)
    entry = {"metric": "top1", "value": numbers["top1"], "metrics": numbers, "num_test": 200}
    assert predictions.contradiction(entry, predictions.read(str(tmp_path), "d")) == ""


def test_a_cell_without_a_candidates_result_is_shown_as_damaged(copy: Path) -> None:
    """As an earlier version left it: selected among the others after a process had died."""
    record = next((copy / "selection").glob("digits-knn-scratch-5*.json"))
    content = json.loads(record.read_text())
    content["candidates"][0] |= {"status": "failed", "digest": "0" * 64}
    record.write_text(json.dumps(content))
    path, entry = a_final(copy)
    edit_entry(path, status="failed", value=None, error="its process died (killed, or out of memory)")
    findings = load_findings(copy)
    rows = {row.method: row for row in scorecard(findings.cells, findings.damages) if row.shots == 5}
    assert "selected without the candidate of k 1" in rows["knn"].damage
    assert entry["selection"] and "its process died" in rows["ridge"].damage and rows["ridge"].num_failed == 1
    lines = lines_of([rows["ridge"]])
    assert lines[0].text(columns_of([rows["ridge"]])[-1]) == "damaged, 1 failed"
    assert "its process died" in to_csv([rows["ridge"]])


@pytest.mark.parametrize("num", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["trials", "selection", "openings", "predictions", "sweep.json"])
def test_a_report_of_any_bytes_is_made_or_refused(copy: Path, kind: str, num: int) -> None:
    path = next((copy / kind).glob("*-*" if kind == "openings" else "*")) if kind != "sweep.json" else copy / kind
    if kind in ("trials", "predictions"):
        path = copy / kind / f"{a_final(copy)[0].stem}{path.suffix}"
    seeds = [path.read_bytes()]
    if kind == "trials":
        edit_entry(path)
        seeds.append(path.read_bytes())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        findings = load_findings(copy)
        check_lineage(findings)
        scorecard(findings.cells, findings.damages)

    found = fuzz(read, mutants(seeds, num), copy)
    assert found["refused"] > num / 3, found
