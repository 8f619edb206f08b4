"""A cell run again: the same trials give the same number, and what would be another measurement is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from pipeline.errors import UserError
from tests.transfer.records import edit_entry
from transfer.results import rerun as module
from transfer.results.rerun import Rerun, rerun
from transfer.results.statistics import Estimate
from transfer.results.sweep_results import load_findings

pytestmark = pytest.mark.usefixtures("stand_ins")
CELL = "digits-ridge-pretrained-5"


def changed(sweep: Path, to: Path, **fields: Any) -> Path:
    """A copy of the sweep with other fields in the finals of one cell."""
    shutil.copytree(sweep, to)
    for path in (to / "trials").iterdir():
        entry = json.loads(path.read_text())
        if entry["kind"] == "final" and entry["selection"].startswith(CELL):
            value = entry["value"] + fields.get("shift", 0.0)
            more = {k: v for k, v in fields.items() if k != "shift"}
            edit_entry(path, **{"value": value, **more})
    return to


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [CELL, "digits-knn-scratch-5"])
def test_a_cell_run_again_gives_its_number_and_leaves_the_sweep_alone(digits_sweep: Path, name: str) -> None:
    before, told = files(digits_sweep), []
    found = rerun(load_findings(digits_sweep).folders[0], name, tell=told.append)
    assert found.lands and found.again == found.recorded and found.recorded.n == 3 == len(told)
    assert found.differences == () and files(digits_sweep) == before


def test_the_verdict_is_the_recorded_interval(
    tmp_path: Path, digits_sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(digits_sweep), "--rerun", CELL]) == 0
    assert "it lands" in capsys.readouterr().out
    other = changed(digits_sweep, tmp_path / "s", shift=-0.3)
    assert main(["report", str(other), "--rerun", CELL]) == 1
    assert "does NOT land" in capsys.readouterr().out


def test_the_edge_of_the_interval_is_one_test_image_wide() -> None:
    recorded = Estimate(0.5, 3, 0.48, 0.52, "t")
    for mean, lands in ((0.52, True), (0.5205, True), (0.522, False), (0.4795, True), (0.478, False)):
        assert Rerun("c", recorded, Estimate(mean, 3), 0.001, ()).lands is lands


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"data_digest": "f" * 64}, "data of digest ffffffffffff made it"),
        ({"protocol_digest": "f" * 64}, "the protocol of digest ffffffffffff made it"),
        ({"status": "failed", "value": None}, "no cell is called"),
    ],
)
def test_another_measurement_is_refused(tmp_path: Path, digits_sweep: Path, fields: dict[str, Any], words: str) -> None:
    folder = load_findings(changed(digits_sweep, tmp_path / "s", **fields)).folders[0]
    with pytest.raises(UserError, match=words):
        rerun(folder, CELL)


def test_other_weights_at_the_url_are_refused(digits_sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_origin", lambda url: Estimate)  # of no digest that fits
    monkeypatch.setattr(Estimate, "digest", "f" * 64, raising=False)
    with pytest.raises(UserError, match="holds other weights now"):
        rerun(load_findings(digits_sweep).folders[0], CELL)


def test_changed_settings_are_said(tmp_path: Path, digits_sweep: Path) -> None:
    other = changed(
        digits_sweep, tmp_path / "s", config={"method": {"l2": 1.0}}, config_digest="old", code_revision="1234"
    )
    found = rerun(load_findings(other).folders[0], CELL)
    assert found.lands and "method.l2" in found.differences[0] and found.differences[-1].startswith("code: 1234 then")


def test_one_cell_is_named_and_one_seed_is_no_interval(tmp_path: Path, digits_sweep: Path) -> None:
    folder = load_findings(digits_sweep).folders[0]
    with pytest.raises(UserError, match="several cells are called 'digits-ridge'"):
        rerun(folder, "digits-ridge")
    with pytest.raises(UserError, match=r"no cell is called 'digits-rigde'; name one of digits-knn"):
        rerun(folder, "digits-rigde")
    one = shutil.copytree(digits_sweep, tmp_path / "s")
    for path in (one / "trials").iterdir():
        if json.loads(path.read_text())["seed"]:
            path.unlink()
    with pytest.raises(UserError, match="one seed and so no interval"):
        rerun(load_findings(one).folders[0], CELL)
