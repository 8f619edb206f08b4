"""Averages of weights: the means that NumPy gives, choices on held-out data alone, and what is refused."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestration.cli import main
from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from pipeline.export.averaging import ALPHAS, Score, average, mean, with_state
from pipeline.export.source import ExportSource, open_source
from pipeline.models.backbone import load_backbone

Make = Callable[..., str]


@pytest.fixture
def members(make_checkpoint: Make, tmp_path: Path) -> list[ExportSource]:
    """Four sources of one make whose weights differ by seeds."""
    first = open_source(make_checkpoint(tmp_path))
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        state = {k: v + 0.1 * torch.randn_like(v) for k, v in first.model.state_dict().items()}
        own = with_state(first, state)
        found.append(replace(own, commit=replace(own.commit, digest=f"{seed}" * 64, url=f"runs/{seed}")))
    return found


def bias(model: nn.Module) -> np.ndarray:
    return model.state_dict()["head.bias"].double().numpy()  # type: ignore[no-any-return]


def nearness(target: np.ndarray) -> Callable[[nn.Module], Score]:
    """A stand-in for accuracy that is largest where the head's bias is `target`."""

    def measure(model: nn.Module) -> Score:
        distance = float(np.abs(bias(model) - target).mean())
        return Score(top1=1 / (1 + distance), loss=distance)

    return measure


def test_a_uniform_average_is_numpys_mean_of_every_weight(members: list[ExportSource]) -> None:
    found = average(members, "uniform")
    states = [m.model.state_dict() for m in members]
    for name, value in found.source.model.state_dict().items():
        expected = np.mean([s[name].double().numpy() for s in states], axis=0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert found.score is None and [one["share"] for one in found.facts["members"]] == [0.25] * 4
    assert found.source.commit.evaluation == {}  # a member's numbers are not the average's


def test_the_ends_of_wise_are_the_two_bit_for_bit(members: list[ExportSource]) -> None:
    states = [m.model.state_dict() for m in members[:2]]
    for alpha, expected in ((0.0, states[0]), (1.0, states[1])):
        found = mean(states, [1 - alpha, alpha])
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    broken = {**states[0], "head.bias": torch.full((5,), torch.inf)}
    assert torch.equal(mean([broken, states[1]], [0.0, 1.0])["head.bias"], states[1]["head.bias"])


def test_wise_takes_the_best_of_its_curve_and_records_it(members: list[ExportSource]) -> None:
    a, b = bias(members[0].model), bias(members[1].model)
    found = average(members[:2], "wise", nearness(0.3 * a + 0.7 * b))
    assert [one["share"] for one in found.facts["members"]] == pytest.approx([0.3, 0.7])
    assert [one["alpha"] for one in found.facts["curve"]] == list(ALPHAS)
    assert found.facts["top1"] == max(one["top1"] for one in found.facts["curve"]) > 0.9999
    flat = average(members[:2], "wise", lambda _: Score(top1=0.5, loss=1.0))
    assert [one["share"] for one in flat.facts["members"]] == [0.0, 1.0]  # of equals the fine-tuned end


@pytest.mark.parametrize("chosen", [(0, 1), (2, 3), (1,), (0, 1, 2, 3)])
def test_greedy_is_recipe_1_of_model_soups(members: list[ExportSource], chosen: tuple[int, ...]) -> None:
    biases = [bias(m.model) for m in members]
    measure = nearness(np.mean([biases[i] for i in chosen], axis=0))
    value = {  # written anew: what the recipe does with the means of all subsets at hand
        subset: 1
        / (
            1
            + np.abs(np.mean([biases[i] for i in subset], axis=0) - np.mean([biases[i] for i in chosen], axis=0)).mean()
        )
        for num in range(1, 5)
        for subset in itertools.combinations(range(4), num)
    }
    order = sorted(range(4), key=lambda i: -value[i,])
    soup = (order[0],)
    for i in order[1:]:
        if value[tuple(sorted((*soup, i)))] >= value[soup] - 1e-9:
            soup = tuple(sorted((*soup, i)))
    found = average(members, "greedy", measure)
    assert tuple(i for i, one in enumerate(found.facts["members"]) if one["share"]) == soup
    assert found.score is not None and found.score.top1 >= max(one["top1"] for one in found.facts["members"]) - 1e-9


@pytest.mark.parametrize(("method", "num", "looks"), [("wise", 2, 11), ("greedy", 4, 7), ("uniform", 3, 4)])
def test_no_weights_are_measured_twice(members: list[ExportSource], method: Any, num: int, looks: int) -> None:
    """The ends of a curve are the members, and what is chosen has been measured."""
    seen = list[bytes]()

    def measure(model: nn.Module) -> Score:
        seen.append(bias(model).tobytes())
        return Score(top1=0.5, loss=1.0)

    average(members[:num], method, measure)
    assert len(seen) == len(set(seen)) == looks


def test_what_does_not_average_is_one_sentence(
    members: list[ExportSource], make_checkpoint: Make, tmp_path: Path
) -> None:
    one = members[0]
    other = open_source(make_checkpoint(tmp_path / "o", "nfnet_tiny", classes=list("abcdef")))
    small = open_source(make_checkpoint(tmp_path / "s", "nfnet_tiny", px=32))
    net = open_source(make_checkpoint(tmp_path / "n", "nf_regnet_b0"))
    for given, method, words in (
        ([one], "uniform", "of one checkpoint"),
        ([one, one], "uniform", "same weights"),
        ([one, other], "uniform", r"heads of different classes \(5 and 6\)"),
        ([one, net], "uniform", "different networks"),
        ([one, small], "uniform", "different preprocessing"),
        (members[:3], "wise", "between two"),
    ):
        with pytest.raises(UserError, match=words):
            average(given, method)  # type: ignore[arg-type]
    norm = replace(one, model=nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(UserError, match="running statistics"):
        average([norm, replace(norm, commit=members[1].commit)], "uniform")


@pytest.mark.slow
def test_from_the_command_line(
    make_checkpoint: Make,
    digits: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    url = make_checkpoint(tmp_path, classes=list(Manifest.open(digits).classes))
    assert main(["export", url, "--format", "safetensors", "--weights", "raw", "--out", "raw"]) == 0
    assert main(["average", url, "raw", "--out", "mean", "--license", "mit"]) == 0
    states = [load_backbone(url, kind).model.state_dict() for kind in ("ema", "raw")]  # type: ignore[arg-type]
    made = load_backbone("mean").model.state_dict()
    assert all(torch.allclose(made[n], (states[0][n] + states[1][n]) / 2, atol=1e-6) for n in made)
    assert "## Average" in Path("mean/README.md").read_text()
    capsys.readouterr()
    assert main(["average", url, "raw", "--method", "wise", "--data", digits, "--out", "wise"]) == 0
    out = capsys.readouterr().out
    assert out.count("alpha ") == 11 and "next: normfree evaluate wise DATA" in out
    facts = json.loads(Path("wise/export.json").read_text())["average"]
    assert facts["data"]["split"] == "val" and [m["url"] for m in facts["members"]] == [url, "raw"]
    for words, sentence in (
        (["--method", "greedy"], "give them with --data"),
        (["--data", digits, "--split", "test"], "nothing is chosen on a test split"),
        (["--alpha", "0.5"], "is of --method wise"),
        (["--last", "2"], "give one run folder"),
    ):
        assert main(["average", url, "raw", "--out", "no", *words]) == 2
        assert sentence in capsys.readouterr().err and not Path("no").exists()
