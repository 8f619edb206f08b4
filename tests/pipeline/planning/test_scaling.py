"""Lines that were put in come out, with intervals that hold them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from orchestration.cli import main
from pipeline.errors import UserError
from pipeline.planning.scaling import FinishedRun, Line, fit, frontier, read

LOSS_SLOPE, SIZE_SLOPE = -0.05, 0.5


def runs(noise: float, *, count: int = 12, seed: int = 0) -> list[FinishedRun]:
    """Best runs on a line, and for each a run of a wrong size that is worse."""
    generator = np.random.default_rng(seed)
    found = []
    for compute in np.geomspace(1e3, 1e5, count):
        loss = 4.2 * compute**LOSS_SLOPE * np.exp(noise * generator.standard_normal())
        size = 1e6 * compute**SIZE_SLOPE
        for name, wrong in (("best", 1.0), ("wrong", 1.1)):
            found.append(
                FinishedRun(
                    name=f"{name} {compute:.0f}", parameters=size * wrong**4, epochs=compute / size * 1e5, loss=loss * wrong,
                    compute=float(compute),
                )
            )  # fmt: skip
    return found


def test_an_exact_line_is_found() -> None:
    found = fit(runs(0.0))
    assert all(run.name.startswith("best") for run in found.frontier) and len(found.frontier) == 12
    assert found.lines["loss"].slope == pytest.approx(LOSS_SLOPE, abs=1e-6)
    assert found.lines["parameters"].slope == pytest.approx(SIZE_SLOPE, abs=1e-6)
    assert found.at("loss", 1e6).value == pytest.approx(4.2 * 1e6**LOSS_SLOPE, rel=1e-5)


@pytest.mark.slow
def test_intervals_hold_the_line_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(20):
        slope = fit(runs(0.004, seed=seed)).slope("loss")
        held += slope.low <= LOSS_SLOPE <= slope.high
    assert held >= 12  # bootstrap intervals of a dozen points are known to be a little short


def test_a_run_that_went_wrong_pulls_little() -> None:
    spoiled = [
        run if i != 0 else FinishedRun(**{**vars_of(run), "loss": run.loss * 1.5})
        for i, run in enumerate(runs(0.0)[::2])
    ]
    assert fit(spoiled).lines["loss"].slope == pytest.approx(LOSS_SLOPE, abs=0.02)


def vars_of(run: FinishedRun) -> dict[str, object]:
    return {name: getattr(run, name) for name in ("name", "parameters", "epochs", "loss", "compute")}


def test_the_frontier_falls() -> None:
    losses = [run.loss for run in frontier(runs(0.02))]
    assert losses == sorted(losses, reverse=True)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="a line needs 4"):
        fit(runs(0.0)[:4])


def test_more_runs_than_can_be_compared_are_refused_before_memory_is_taken() -> None:
    many = [FinishedRun(name="a", parameters=1.0, epochs=1.0, loss=1 / n, compute=float(n)) for n in range(1, 30_000)]
    with pytest.raises(UserError, match="give 500 at most"):
        fit(many)


def test_numbers_are_taken_as_json_writes_them_and_no_budget_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([{"name": "a", "parameters": 3e18, "epochs": 1e-5, "loss": 2.0, "compute": 2e20}]))
    assert read(str(file)) == [FinishedRun(name="a", parameters=3e18, epochs=1e-5, loss=2.0, compute=2e20)]
    assert Line(at=0.0, slope=-9.0, centre=1.0)(1e-300) == math.inf


def test_the_command_proposes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "runs.json", tmp_path / "scaling.png"
    file.write_text(json.dumps([vars_of(run) for run in runs(0.003)]))
    assert main(["plan", "--scaling", str(file), "--budget", "1e6", "--plot", str(plot), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    loss = report["proposal"]["loss"]
    assert loss["low"] < 4.2 * 1e6**LOSS_SLOPE * 1.02 and loss["high"] > 4.2 * 1e6**LOSS_SLOPE * 0.98
    assert report["beyond"] == pytest.approx(10) and plot.read_bytes()[:4] == b"\x89PNG"
    assert main(["plan", "--scaling", str(file), "--budget", "1e9"]) == 0
    assert "far beyond what was tried" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"a": 1}', "is no list of runs"),
        ('[{"name": "a", "parameters": 1, "epochs": 1, "loss": -1}]', "loss"),
        ('[{"name": "a", "parameters": 1, "epochs": 1}]', "loss"),
        ('[{"name": "a", "compute": 1}, {"name": "b"}]', "for all, or for none"),
    ],
)
def test_a_bad_file_gets_one_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        read(str(file))


def test_compute_is_parameters_times_epochs_where_it_is_not_given(tmp_path: Path) -> None:
    file = tmp_path / "runs.yaml"
    file.write_text("- {name: a, parameters: 7, epochs: 3, loss: 2.0}\n")
    assert read(str(file))[0].compute == 21
