"""A probe with one point fits its finals and nothing else, and its record says that nothing was searched."""

from pathlib import Path
from typing import Any

import pytest

from tests.transfer.conftest import run_sweep
from transfer.probes import fit
from transfer.protocol.method_settings import KnnSettings, LinearSettings, RidgeSettings
from transfer.protocol.methods import Method
from transfer.results.sweep_results import load_findings

METHODS = (
    Method(name="ridge", kind="ridge", settings=RidgeSettings(shots=(5,))),
    Method(name="linear", kind="linear", settings=LinearSettings(shots=(5,), learning_rates=(0.01,), num_steps=5)),
    Method(name="knn", kind="knn", settings=KnnSettings(shots=(5,), ks=(1, 5))),
)


def test_what_is_not_searched_is_not_fitted_on_the_search_split(
    tmp_path: Path, digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[str] = []
    plain = fit.fit

    def counted(method: Method, *args: Any, **options: Any) -> fit.Scorer:
        fitted.append(method.name)
        return plain(method, *args, **options)

    monkeypatch.setattr(fit, "fit", counted)
    found = load_findings(str(run_sweep(tmp_path / "s", digits, methods=METHODS, num_seeds=2)))
    cells, seeds = 2, 2  # pretrained and from scratch
    assert fitted.count("ridge") == fitted.count("linear") == cells * seeds
    assert fitted.count("knn") == cells * (1 + 2 * seeds)  # its search; each k of a final
    assert {e.method for e in found.finals} == {"ridge", "linear", "knn"} and len(found.finals) == 3 * cells * seeds
    records = {str(found.selection(cell)["method"]): found.selection(cell) for cell in found.cells}
    for name in ("ridge", "linear"):
        assert records[name]["candidates"] == [] and "nothing was searched" in records[name]["rule"]
    assert len(records["knn"]["candidates"]) == 2
