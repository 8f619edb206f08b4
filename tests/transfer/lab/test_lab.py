"""The laboratory: experiments, lines, verdicts, and the table from a ledger."""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nfnet.normalizers.registry import list_methods
from pipeline.errors import UserError
from pipeline.training.run import Run
from transfer.lab.build import lines_of, sweep_of_experiment
from transfer.lab.claims import Told, claim_cells, write_claims
from transfer.lab.experiment import Comparison, Experiment, list_experiments, load_experiment, parse_method
from transfer.lab.page import cells_of, sides_of, to_csv
from transfer.lab.table import LabRow, mean_of
from transfer.lab.verdict import judge, verdict
from transfer.protocol.methods import Method
from transfer.sweep.cells import Sweep
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.finetune import finetune_run
from transfer.sweep.ledger import SweepInfo


def experiment(**fields: Any) -> Experiment:
    return Experiment(**{"name": "test", "methods": ("batch_norm", "none"), **fields})


def entry(seed: int, value: float | None, **measures: float) -> LedgerEntry:
    return LedgerEntry(
        digest=f"{seed:064x}",
        kind="final",
        task="digits",
        task_title="Digits",
        method="m",
        init="scratch",
        shots=0,
        seed=seed,
        metric="top1",
        value=value,
        num_train=10,
        num_test=10,
        hyperparameters={"learning_rate": 0.1, "num_steps": 8},
        seconds_s=2.0,
        images_seen=80,
        protocol_digest="p",
        checkpoint_url="",
        checkpoint_digest="",
        data_digest="d",
        status="ok" if value is not None else "failed",
        error=None if value is not None else "not finite",
        cause="" if value is not None else "diverged",
        measures=dict(measures),
    )


def row(method: str, values: list[float | None], **fields: Any) -> LabRow:
    (line,) = lines_of(experiment(methods=(method,), **fields))
    return LabRow(line=line, entries=[entry(i, v, eval_mode=0.5, train_mode=0.4) for i, v in enumerate(values)])


@pytest.mark.parametrize("size", ["tiny", "full"])
@pytest.mark.parametrize("name", list_experiments())
def test_every_committed_experiment_makes_a_sweep_and_finds_its_lines(
    name: str, size: str, digits: str, tmp_path: Path
) -> None:
    found = load_experiment(name).at_size(size)
    assert found.name == name
    assert found.claim
    assert found.source
    assert found.settles
    for card in {"digits", found.first.card if found.first else ""} - {""}:
        (tmp_path / card).symlink_to(digits)
    sweep, lines = sweep_of_experiment(found, data=f"{tmp_path}/digits", out=f"{tmp_path}/out")
    rows = [LabRow(line=line) for line in lines]
    judged = verdict(found, rows)
    assert judged is not None
    assert judged.word == "unclear"  # nothing was run
    assert len({line.recipe for line in lines}) == len(sweep.suite.methods)


def test_groups_are_for_methods_that_have_them_and_batches_for_all() -> None:
    lines = lines_of(experiment(batches=(8, 16), stat_groups=(2, 16)))
    assert [(x.word, x.batch, x.stat_group) for x in lines] == [
        ("batch_norm", 8, 2),
        ("batch_norm", 16, 2),
        ("batch_norm", 16, 16),
        ("none", 8, None),
        ("none", 16, None),
    ]
    one = lines_of(experiment(methods=("batch_norm:stat_group=4",), stat_groups=(2, 16)))
    assert [x.stat_group for x in one] == [None]


def test_a_bare_name_has_the_methods_own_clipping_and_any_other_is_shown() -> None:
    words = ("normalizer_free", "normalizer_free:clipping=0", "none", "none:clipping=0.02")
    shown = [line.shown for line in lines_of(experiment(methods=words))]
    assert shown == ["normalizer_free", "normalizer_free clipping 0", "none", "none clipping 0.02"]


def test_each_rate_is_a_line_or_is_chosen() -> None:
    rates = {"methods": ("none",), "rates": (0.1, 0.4)}
    assert [x.rate for x in lines_of(experiment(**rates))] == [None]
    assert [x.rate for x in lines_of(experiment(**rates, each_rate=True))] == [0.1, 0.4]


def test_a_network_is_measured_by_its_own_recipes_only(tmp_path: Path) -> None:
    """Clipping is the recipe's: with and without it is one network by two recipes, under one name."""
    two = experiment(methods=("normalizer_free:clipping=0", "normalizer_free", "none"))
    sweep, lines = sweep_of_experiment(two, data=f"{tmp_path}/digits", out=f"{tmp_path}")
    both = ("batch_128_clipping_0", "batch_128_clipping_0p02")
    assert [(s.name, s.methods) for s in sweep.sources] == [("normalizer_free", both), ("none", both[:1])]
    assert sweep.sources[1].inits(both[0]) == ("scratch",)
    assert sweep.sources[1].inits(both[1]) == ()
    assert len({s.backbone_digest for s in sweep.sources}) == 2
    assert len({(line.network, line.recipe) for line in lines}) == 3
    assert [m.settings.clipping for m in sweep.suite.methods] == [0.0, 0.02]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"methods": ("bach_norm",)}, "no method 'bach_norm'"),
        ({"methods": ("batch_norm:stat_groups=2",)}, "no setting 'stat_groups'"),
        ({"methods": ("none:clipping=much",)}, "clipping is .much."),
        ({"trunk": "vgg"}, "trunk is 'vgg'"),
    ],
)
def test_an_experiment_says_what_is_wrong(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        experiment(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"batches": (1,)}, "batch_norm at batch 1: statistics over one sample say nothing"),
        ({"stat_groups": (3,), "batches": (8,)}, "does not divide into groups of 3 samples"),
        ({"methods": ("group_norm:groups=5",)}, "5 groups do not divide 32 channels"),
        ({"methods": ("fixup",), "trunk": "vgg_tiny"}, "fixup changes residual branches"),
    ],
)
def test_lines_that_cannot_be_are_refused_before_anything_trains(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        lines_of(experiment(**fields))


def test_a_methods_words_are_read() -> None:
    assert parse_method("normalizer_free:alpha=0.3:clipping=0.01") == (
        "normalizer_free",
        {"alpha": "0.3"},
        {"clipping": 0.01},
    )
    for name in list_methods():
        assert parse_method(name) == (name, {}, {})


def compared(high: list[float | None], low: list[float | None], **fields: Any) -> tuple[str, str]:
    comparison = Comparison(high={"method": "batch_norm"}, low={"method": "none"}, **fields)
    found = judge(comparison, [row("batch_norm", high), row("none", low)])
    return found.word, found.reason


def test_a_difference_must_be_larger_than_its_noise() -> None:
    assert compared([0.50, 0.52, 0.51], [0.40, 0.41, 0.42])[0] == "passes"
    assert compared([0.40, 0.41, 0.42], [0.50, 0.52, 0.51])[0] == "fails"
    word, reason = compared([0.50, 0.40, 0.45], [0.44, 0.41, 0.46])
    assert word == "unclear"
    assert "seeds would show it" in reason
    assert compared([0.5], [0.4]) == ("unclear", "one seed has no noise to compare with; run more with --seeds")
    assert compared([0.50, 0.52, 0.51], [0.40, 0.41, 0.42], least=0.2)[0] == "fails"


def test_a_least_below_zero_asks_for_no_more_than_that_gap() -> None:
    level, near, far = [0.50, 0.51, 0.52], [0.49, 0.50, 0.51], [0.40, 0.41, 0.42]
    assert compared(near, level, least=-0.05)[0] == "passes"
    assert compared(far, level, least=-0.05)[0] == "fails"
    assert compared(near, level, least=-0.02)[0] == "unclear"
    assert compared(level, far, least=-0.02)[0] == "passes"


def test_gains_over_other_lines_are_compared_with_the_noise_of_all_four() -> None:
    rows = [
        row(name, [value - 0.01, value, value + 0.01])
        for name, value in (("batch_norm", 0.50), ("none", 0.40), ("group_norm", 0.55), ("fixup", 0.30))
    ]
    sides: Any = {
        "high": {"method": "group_norm"},
        "high_over": {"method": "fixup"},
        "low": {"method": "batch_norm"},
        "low_over": {"method": "none"},
    }
    found = judge(Comparison(**sides), rows)
    assert (found.word, found.difference) == ("passes", pytest.approx(0.15))
    assert found.noise == pytest.approx(2 * 2 * 0.01 / 3**0.5)  # two standard errors, of four means
    assert sides_of(found.comparison).startswith("gain of group_norm over fixup above gain of batch_norm over none")
    with pytest.raises(UserError, match="give both, or neither"):
        Comparison(**{k: v for k, v in sides.items() if k != "low_over"})


def test_shares_and_gaps_are_made_of_measures() -> None:
    (found,) = row("none", [0.3]).entries
    lists: dict[str, Any] = {"squared_mean": [1.0, 0.0, 0.0], "variance": [3.0, 2.0, 0.0]}
    one = replace(row("none", []), entries=[replace(found, measures={"eval_mode": 0.5, **lists})])
    assert one.mean("generalisation_gap").value == pytest.approx(0.2)  # type: ignore[union-attr]
    assert one.mean("constant_share").value == pytest.approx(0.25 / 3)  # type: ignore[union-attr]


def test_claims_that_these_data_cannot_give_are_left_out_by_name(
    digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestration.commands.operations.lab import _possible

    asked = [load_experiment(name).at_size("tiny") for name in ("pretrained_transfer", "mean_shift")]
    words = argparse.Namespace(data=digits, out=str(tmp_path))
    assert [e.name for e in _possible(asked, words)] == ["mean_shift"]
    said = capsys.readouterr().out
    assert "left out: experiment pretrained_transfer trains on" in said and "1 of 2 experiments" in said
    with pytest.raises(UserError, match="pretrained_transfer trains on"):
        _possible(asked[:1], words)


def test_divergence_is_a_statistic() -> None:
    assert compared([0.5, 0.5, 0.5], [None, None, None], statistic="finishes")[0] == "passes"
    assert row("none", [0.5, None]).num_diverged == 1


def test_a_line_that_always_diverges_is_below_one_that_always_finishes() -> None:
    ends, never = [0.5, 0.5, 0.5], [None, None, None]
    assert compared(ends, never) == ("passes", "every seed of the second line diverged, none of the other")
    assert compared(ends, never, least=0.3)[0] == "passes"  # there is no model to be within 0.3
    assert compared(never, ends)[0] == "fails"
    assert compared(never, never)[0] == "unclear"
    assert compared([0.5, None, 0.5], never)[0] == "unclear"
    assert compared([0.5], [None])[0] == "unclear"  # one seed
    assert compared(ends, never, statistic="clipped_share")[0] == "unclear"  # a run that diverged had some


def test_survivors_alone_make_no_winner() -> None:
    word, reason = compared([0.50, 0.52, None], [0.40, 0.41, 0.42])
    assert word == "unclear" and reason.endswith("of the seeds that finished only: 1 and 0 of their seeds diverged")
    assert compared([0.50, 0.52, 0.51], [0.40, 0.41, None])[0] == "passes"
    assert compared([0.40, 0.41, 0.42], [0.50, 0.52, None])[0] == "unclear"


def test_a_line_whose_every_rate_diverged_has_a_row() -> None:
    nowhere = [replace(e, hyperparameters={}) for e in row("none", [None, None]).entries]
    found = replace(row("none", []), entries=nowhere)
    assert (found.num_diverged, found.rate) == (2, None) and cells_of(found)[2] == "–"


def test_a_comparison_names_exactly_one_line() -> None:
    rows = [row("none", [0.5, 0.6])]
    with pytest.raises(UserError, match="0 lines of the experiment are that"):
        judge(Comparison(high={"method": "none"}, low={"method": "fixup"}), rows)


def test_the_table_has_means_and_standard_errors() -> None:
    mean = mean_of([0.4, 0.6])
    assert mean is not None
    assert (mean.value, mean.n) == (0.5, 2)
    assert mean.error == pytest.approx(0.1)
    cells = cells_of(row("none", [0.4, 0.6]))
    assert cells[:6] == ["none", "128", "0.1", "2", "0", "50.0 ± 10.0"]
    assert cells[7] == "+10.0 ± 0.0"  # evaluation mode minus training mode
    assert to_csv([row("none", [0.4, 0.6])]).splitlines()[0].startswith("method,batch,rate,seeds")
    assert cells_of(replace(row("none", []), entries=[]))[5] == "–"


ROOT = Path(__file__).parents[3]


def test_the_pages_of_methods_are_their_modules_words() -> None:
    from orchestration.commands.operations.method_pages import markdown

    pages = {p.stem: p.read_text() for p in (ROOT / "docs/normalizers").glob("*.md")}
    remedy = "run: python -m orchestration.commands.operations.method_pages docs"
    assert pages == {name: markdown(name, ROOT / "docs") for name in list_methods()}, remedy


def test_the_documented_method_of_ones_own_is_short_and_works() -> None:
    import torch

    from nfnet.normalizers.method import METHODS
    from nfnet.trunks.networks import create

    code = (ROOT / "docs/methods-and-trunks.md").read_text().rpartition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) <= 60
    try:
        exec(compile(code, "root_mean_square.py", "exec"), {"__name__": "root_mean_square"})
        network = create("resnet_v2_tiny", 4, method=METHODS["root_mean_square"](), widths=(8, 8, 8))
        assert network(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    finally:
        METHODS.pop("root_mean_square", None)


def test_how_gradients_are_clipped_is_a_line_of_its_own_on_one_network() -> None:
    words = ("clip=norm:clip_norm=0.5", "clip=agc_layer", "unclipped=stage 0+stage 1", "clip_head=true")
    lines = lines_of(experiment(methods=tuple(f"normalizer_free:{w}" for w in words)))
    assert len({line.network for line in lines}) == 1
    assert len({line.recipe for line in lines}) == len({line.shown for line in lines}) == 4
    assert [line.settings for line in lines] == [
        {"clip": "norm", "clip_norm": 0.5},
        {"clipping": 0.02, "clip": "agc_layer"},
        {"clipping": 0.02, "unclipped": ("stage 0", "stage 1")},
        {"clipping": 0.02, "clip_head": True},
    ]


def test_correlated_batches_are_a_recipe_and_are_refused_without_classes(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(methods=("group_norm", "group_norm:correlated=true"))
    sweep, lines = sweep_of_experiment(asked, data=digits, out=f"{tmp_path}/out")
    assert [line.network for line in lines] == ["group_norm"] * 2
    assert [m.settings.correlated for m in sweep.suite.methods] == [False, True]  # type: ignore[union-attr]
    plain, correlated = (m.plain() for m in sweep.suite.methods)
    assert "correlated" not in plain and correlated["correlated"]  # no digest of an earlier protocol changes
    orders = [_run(sweep, method).data.order for method in sweep.suite.methods]
    assert orders == ["windowed", "correlated"]
    monkeypatch.setattr(
        "transfer.lab.build.Manifest.open", lambda url: SimpleNamespace(classes=["only"])
    )  # adopted tars
    with pytest.raises(UserError, match="has 1 class, and correlated batches are sorted by class"):
        sweep_of_experiment(asked, data=digits, out=f"{tmp_path}/out")


def _run(sweep: Sweep, method: Method) -> Run:
    init = {"init": "scratch", "shots": 0, "seed": 0, "hyperparameters": {"learning_rate": 0.1, "num_steps": 2}}
    return finetune_run(sweep.source, sweep.task("digits"), method, **init, test=None)  # type: ignore[arg-type]


def test_a_size_changes_the_fields_that_it_names_and_refuses_others() -> None:
    found = experiment(epochs=8.0, tiny={"epochs": 2})
    assert found.at_size("full").epochs == 8
    assert found.at_size("tiny") == replace(found, epochs=2.0, tiny={})
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        experiment(tiny={"epoch": 2}).at_size("tiny")


def test_claims_are_one_table_a_line_for_each_comparison(tmp_path: Path) -> None:
    found = load_experiment("agc_pieces")
    _, lines = sweep_of_experiment(found, data=f"{tmp_path}/digits", out=f"{tmp_path}/out")
    told = Told(
        experiment=found,
        found=verdict(found, [LabRow(line=line) for line in lines]),
        info=SweepInfo(
            **dict.fromkeys(("suite", "suite_digest", "checkpoint_url", "checkpoint_digest", "model"), ""),
            started_s=0.0,
            command="normfree lab claims",
            hardware="2 cores",
            num_seeds=3,
            not_run=[],
        ),
        data=f"{tmp_path}/digits",
    )
    cells = claim_cells(told)
    assert [c[0] for c in cells] == ["agc_pieces"] * len(found.compare)
    assert {c[5] for c in cells} == {"unclear"}
    paths = write_claims([told], str(tmp_path))
    assert len(Path(paths["csv"]).read_text().splitlines()) == 1 + len(cells)
    assert found.claim in Path(paths["html"]).read_text()
