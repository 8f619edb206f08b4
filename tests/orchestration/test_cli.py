"""What a person meets: help, and one sentence with exit code 2 for each mistake."""

import shlex
import shutil
from pathlib import Path

import pytest

from orchestration.cli import build_parser, main


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(shlex.split(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


COMMANDS = [
    "",
    "data",
    "data prepare",
    "data verify",
    "data cards",
    "inspect",
    "pretrain",
    "evaluate",
    "transfer",
    "report",
    "ui",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(f"{command} --help", capsys)
    assert code == 0 and (command in ("", "data") or "examples:\n  normfree " in out)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("", "data")])
def test_every_example_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(f"{command} --help", capsys)
    examples = [line.strip() for line in out.split("examples:")[1].splitlines() if line.startswith("  normfree ")]
    assert examples
    for example in examples:
        args, _ = build_parser().parse_known_args(shlex.split(example)[1:])
        assert args.handler


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data prepare cifar_100 --out {tmp}/x", "cifar100"),
        ("data prepare cifar10 --source {tmp}/nothing.tar --out {tmp}/x", "nothing.tar"),
        ("data prepare cifar10 --source {tmp} --out {tmp}/x", "missing or empty"),
        ("data prepare images --out {tmp}/x", "source"),
        ("data verify {tmp}/nothing", "nothing"),
        ("pretrain nfnet_tiny_glyph --out {tmp}/x", "did you mean 'nfnet_tiny_glyphs'"),
        ("pretrain nfnet_tiny_glyphs", "--out"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x", "no data"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x --data.url {tmp}/nothing", "nothing"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x --optim.learning_rat 1", "did you mean 'learning_rate'"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x --seed", "needs a value"),
        ("pretrain {tmp}/nothing.yaml --out {tmp}/x", "no file"),
        ("inspect nfnet_f44", "nfnet_f4"),
        ("evaluate {tmp}/nothing {tmp}/x", "no checkpoint at"),
        ("transfer {tmp}/nothing --suite demo --data-root {tmp} --out {tmp}/x", "no checkpoint at"),
        ("transfer {tmp}/nothing --suite dem --data-root {tmp} --out {tmp}/x", "demo"),
        ("report {tmp}/nothing", "nothing"),
        ("ui", "--tracking-uri"),
        ("ui {tmp}", "mlflow.db"),
        ("prepare", "invalid choice"),
        ("inspect nfnet_f0 --pixels 3", "unknown argument"),
    ],
)
def test_a_mistake_gets_one_sentence_and_two(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(words.format(tmp=tmp_path), capsys)
    assert code == 2, err
    assert err.startswith("normfree: ") and len(err.strip().splitlines()) == 1 and message in err
    assert not (tmp_path / "x" / "manifest.json").exists() and not (tmp_path / "x" / "run.yaml").exists()


def test_verify_sees_one_changed_byte(digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    assert run(f"data verify {copy}", capsys)[0] == 0
    shard = next(copy.glob("train-*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, out, err = run(f"data verify {copy}", capsys)
    assert code == 1 and shard.name in out and "does not match its manifest" in err


def test_inspect_prints_the_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("inspect nfnet_f4+", capsys)
    assert code == 0 and "527,033,076 parameters" in out and "367.414 G multiply-adds at 512 px" in out


def test_show_prints_the_resolved_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("pretrain nfnet_tiny_glyphs --show --optim.learning_rate 0.125", capsys)
    assert code == 0 and "learning_rate: 0.125" in out
