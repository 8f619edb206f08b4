"""The words of `normfree lab`, and a small laboratory from the command to its page."""

from pathlib import Path

import pytest

from nfnet.normalizers.registry import list_methods
from orchestration.cli import build_parser, main
from orchestration.commands.operations.lab import experiments_of
from transfer.lab.experiment import RateSearch, list_experiments


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("lab --methods none --out {tmp}/x", "--data is missing"),
        ("lab --methods none --data {tmp}/digits", "--out is missing"),
        ("lab agc --data {tmp}/digits --out {tmp}/x", "no experiment 'agc'"),
        ("lab claims --epochs 3 --data {tmp}/digits --out {tmp}/x", "--epochs does not go with all claims"),
        ("lab claims --each-rate --data {tmp}/digits --out {tmp}/x", "--each-rate does not go with all claims"),
        ("lab claims --budget 3 --data {tmp}/digits --out {tmp}/x", "--budget does not go with all claims"),
        ("lab --methods none --size tiny --data {tmp}/digits --out {tmp}/x", "--size is an experiment's"),
        ("lab --methods nothing --data {tmp}/digits --out {tmp}/x", "no method 'nothing'"),
        (
            "lab --methods batch_norm --batches 1 --data {tmp}/digits --out {tmp}/x",
            "set batch and stat_group to 2 or more",
        ),
        ("lab --methods none --epochs many --data {tmp}/digits --out {tmp}/x", "epochs"),
        ("lab --methods none --data {tmp}/digits --out {tmp}/x", "not prepared"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_code_2(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.format(tmp=tmp_path).split()) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "x" / "trials").exists()


def test_the_list_has_methods_trunks_and_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("normalizer_free", "resnet50_v2", "agc_high_rate"))


def test_without_an_experiment_all_methods_are_trained() -> None:
    (found,) = experiments_of(build_parser().parse_args(["lab", "--data", "d", "--out", "o"]))
    assert found.methods == tuple(list_methods()) and found.seeds == 3


def test_options_change_an_experiments_fields_at_its_size() -> None:
    words = [
        "lab",
        "bounded_function",
        "--size",
        "tiny",
        "--rates",
        "0.1,0.2",
        "--each-rate",
        "--data",
        "d",
        "--out",
        "o",
    ]
    (found,) = experiments_of(build_parser().parse_args(words))
    assert (found.epochs, found.rates, found.each_rate) == (6.0, (0.1, 0.2), True)
    every = experiments_of(build_parser().parse_args(["lab", "claims", "--size", "tiny", "--data", "d", "--out", "o"]))
    assert [e.name for e in every] == list_experiments()


def test_every_method_a_second_time_and_what_is_measured_besides() -> None:
    words = (
        "lab --methods none,batch_norm:correlated=true --correlated --largest-rate --downstream a,b --data d --out o"
    )
    (found,) = experiments_of(build_parser().parse_args(words.split()))
    assert sorted(found.methods) == ["batch_norm:correlated=true", "none", "none:correlated=true"]
    assert found.largest_rate == RateSearch() and found.downstream == ("a", "b")


@pytest.mark.slow
def test_a_divergence_is_recorded_once_and_bisection_finds_the_rate_below_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", "digits", "--out", f"{tmp_path}/digits"]) == 0
    (tmp_path / "e.yaml").write_text(
        "{name: e, claim: c, methods: [none], rates: [0.02, 1.0e+6], each_rate: true, shots: 10, epochs: 2, seeds: 2, "
        "batches: [32], largest_rate: {low: 0.02, high: 1.0e+6, halvings: 1, epochs: 1}, compare: "
        "[{high: {method: none, rate: 0.02}, low: {method: none, rate: 1.0e+6}}]}"
    )
    command = f"lab {tmp_path}/e.yaml --data {tmp_path}/digits --out {tmp_path}/lab --max-concurrent 1"
    command += f" --tracking-uri sqlite:///{tmp_path}/mlruns.db"
    assert main(command.split()) == 0  # a divergence is a result
    first = capsys.readouterr().out
    assert "claim e: passes" in first and "every seed of the second line diverged, none of the other" in first
    assert "4 trials now, 2 failed" in first
    assert main(command.split()) == 0
    again = capsys.readouterr().out
    assert "0 trials now, 0 failed" in again and "claim e: passes" in again
    row = (tmp_path / "lab/report/lab.csv").read_text().splitlines()[1]
    assert (
        len(list((tmp_path / "lab/largest_rate").iterdir())) == 2 and "141.4" in row
    )  # sqrt(0.02 * 1e6), one side of it


@pytest.mark.slow
def test_a_laboratory_ends_in_a_table_and_a_page_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", "digits", "--out", f"{tmp_path}/digits"]) == 0
    command = f"lab --methods none,group_norm --shots 10 --epochs 2 --batches 32 --rates 0.02 --data {tmp_path}/digits"
    command += f" --out {tmp_path}/lab --max-concurrent 1 --tracking-uri sqlite:///{tmp_path}/mlruns.db"
    assert main([*command.split(), "--seeds", "1"]) == 0
    capsys.readouterr()
    assert main([*command.split(), "--seeds", "2"]) == 0  # grows by a seed
    out = capsys.readouterr().out
    assert "2 trials now" in out
    table = (tmp_path / "lab/report/lab.csv").read_text().splitlines()
    assert [line.split(",")[3] for line in table[1:]] == ["2", "2"]
    assert "Every method, on equal terms" in (tmp_path / "lab/report/lab.html").read_text()
