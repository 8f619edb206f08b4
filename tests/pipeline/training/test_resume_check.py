"""A resumed run goes on as the one that was saved; what goes on otherwise is found."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint import load
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.data.loading.datasets import TrainData
from pipeline.duration import Duration
from pipeline.engine import loss_window
from pipeline.engine.loss_window import FIRST, WINDOW, compare
from pipeline.errors import UserError
from pipeline.records import Deviation, Finished, Record
from pipeline.training.run import Run
from pipeline.training.train import train
from tests.pipeline.training.test_train import make_run


def small_run(url: str, **changes: Any) -> Run:
    return make_run(url, **{"duration": Duration(6, "steps"), "save_every": None, "eval_every": None, **changes})


@pytest.fixture(scope="module")
def left(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("left") / "run"
    run = small_run(digits)
    list(train(run, str(folder), leave_at=4))
    return run, folder


@pytest.fixture
def half(left: tuple[Run, Path], tmp_path: Path) -> tuple[Run, str]:
    """A run of six steps that was left after four."""
    shutil.copytree(left[1], tmp_path / "run")
    return left[0], str(tmp_path / "run")


def deviations(records: list[Record]) -> list[Deviation]:
    return [r for r in records if isinstance(r, Deviation)]


def commit_file(out: str) -> Path:
    return next(Path(out).glob("checkpoints/*/commit.json"))


def test_a_resume_that_nothing_disturbs_says_nothing(half: tuple[Run, str]) -> None:
    run, out = half
    expected = json.loads(commit_file(out).read_text())["expected"]
    assert set(expected["sums"]) == {"weights", "momentum", "ema"} and len(expected["losses"]) == 4
    records = list(train(run, out))
    assert isinstance(records[-1], Finished) and not deviations(records)


def test_a_checkpoint_of_an_earlier_version_is_compared_with_nothing(half: tuple[Run, str]) -> None:
    run, out = half
    content = json.loads(commit_file(out).read_text())
    del content["expected"]
    commit_file(out).write_text(json.dumps(content))
    records = list(train(run, out))
    assert isinstance(records[-1], Finished) and not deviations(records)


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[load.Piece]], list[load.Piece]]) -> None:
    """Restored is what belongs to other pieces of the state than are asked for."""
    fill = load.fill

    def other(commit: Any, cache_dir: str, pieces: Iterable[load.Piece], *rest: Any) -> None:
        fill(commit, cache_dir, change(list(pieces)), *rest)

    monkeypatch.setattr(load, "fill", other)


def plant_lost_momentum(monkeypatch: pytest.MonkeyPatch) -> str:
    plant(monkeypatch, lambda pieces: [piece for piece in pieces if piece.kind != "momentum"])
    return "the optimiser's momentum"


def plant_averaged_weights(monkeypatch: pytest.MonkeyPatch) -> str:
    fill = load.fill

    def averaged(commit: Any, cache_dir: str, pieces: Iterable[load.Piece], *rest: Any) -> None:
        pieces = list(pieces)
        fill(commit, cache_dir, [p for p in pieces if p.kind != "weights"], *rest)
        fill(commit, cache_dir, [p._replace(kind="ema") for p in pieces if p.kind == "weights"], *rest)

    monkeypatch.setattr(load, "fill", averaged)
    return "the weights"


def plant_exchanged_momentum(monkeypatch: pytest.MonkeyPatch) -> str:
    """Of two parameters of one size: the sum over all of them stays what it was."""

    def exchange(pieces: list[load.Piece]) -> list[load.Piece]:
        by_size: dict[int, int] = {}
        for i, piece in enumerate(pieces):
            if piece.kind == "momentum":
                j = by_size.setdefault(piece.values.numel(), i)
                if j != i:
                    pieces[i], pieces[j] = (
                        pieces[i]._replace(values=pieces[j].values),
                        pieces[j]._replace(values=piece.values),
                    )
                    return pieces
        raise AssertionError("no two parameters have one size")

    plant(monkeypatch, exchange)
    return "the optimiser's momentum"


def plant_other_order(monkeypatch: pytest.MonkeyPatch) -> str:
    """The data begin anew at each start, as a loader does that was not told where the run is."""
    batches = TrainData.batches

    def from_the_beginning(self: TrainData, *, steps: range, **rest: Any) -> Any:
        return batches(self, steps=range(len(steps)), **rest)

    monkeypatch.setattr(TrainData, "batches", from_the_beginning)
    return "step 5 got other samples"


FAULTS = [plant_lost_momentum, plant_averaged_weights, plant_exchanged_momentum, plant_other_order]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_resume_ends_the_run_before_it_saves_anything(
    fault: Any, half: tuple[Run, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = half
    text = fault(monkeypatch)
    records: list[Record] = []
    with pytest.raises(UserError, match="does not go on as it was saved") as error:
        records.extend(train(run, out))
    assert text in str(error.value) and "saving.stop_after_resume" in str(error.value)
    assert len(list(Path(out).glob("checkpoints/step_*"))) == 1


def test_it_goes_on_all_the_same_where_that_is_configured(
    half: tuple[Run, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = half
    plant_lost_momentum(monkeypatch)
    records = list(train(dataclasses.replace(run, saving=SavingConfig(stop_after_resume="never")), out))
    (found,) = deviations(records)
    assert isinstance(records[-1], Finished) and found.is_certain and found.what == "state"


# --- the statistical part -----------------------------------------------------------------------------------------------


def falling(num: int, *, noise: float, seed: int, start: int = 0) -> np.ndarray:
    """Losses of a scripted run: 2 + 4 exp(-t / 300), with noise of heavy tails (Student's t, 4 degrees of freedom)."""
    rng = np.random.default_rng(seed)
    t = np.arange(start, start + num)
    return 2 + 4 * np.exp(-t / 300) + noise * rng.standard_t(4, num) / np.sqrt(2)


def test_a_run_that_goes_on_is_no_deviation_in_2000_resumes() -> None:
    scores = []
    for seed in range(200):
        losses = falling(1000, noise=0.05, seed=seed)
        for step in range(WINDOW, 1000 - FIRST, 95):
            found = compare(losses[step - WINDOW : step], losses[step : step + FIRST])
            assert found is not None
            scores.append(found.score)
    assert len(scores) == 2000 and max(scores) < loss_window.LIMIT


@pytest.mark.parametrize("offset", [0.5, -0.5, float("nan")])
def test_losses_that_jump_are_a_deviation(offset: float) -> None:
    losses = falling(200, noise=0.05, seed=1)
    found = compare(losses[100 : 100 + WINDOW], losses[150 : 150 + FIRST] + offset)
    assert found is not None and found.deviates


def test_wild_values_in_the_window_neither_hide_a_jump_nor_make_one() -> None:
    losses = falling(200, noise=0.05, seed=2)
    losses[100:150:5] = 50.0
    window = losses[100:150]
    same, jumped = compare(window, losses[150:160]), compare(window, losses[150:160] + 0.5)
    assert same is not None and jumped is not None and not same.deviates and jumped.deviates


def test_a_short_window_says_nothing() -> None:
    assert compare([1.0] * (WINDOW - 1), [9.0] * FIRST) is None


def test_losses_that_hardly_vary_make_nothing_out_of_nothing() -> None:
    found = compare([2.0] * WINDOW, [2.001] * FIRST)
    assert found is not None and not found.deviates


@pytest.mark.slow
def test_thirty_resumes_that_nothing_disturbs_raise_nothing(digits: str, tmp_path: Path) -> None:
    """Left and resumed after each ninth to fourteenth step: windows fill up, and comparisons take place."""
    run = dataclasses.replace(small_run(digits), duration=Duration(400, "steps"), log_every_steps=400)
    step, records = 0, list[Record]()
    for number in range(31):
        step += 9 + number % 6
        records += list(train(run, str(tmp_path / "run"), leave_at=step))
    assert step > 5 * WINDOW and not deviations(records)
