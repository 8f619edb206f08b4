"""What a person meets: help, and one sentence with exit code 2 for each mistake."""

import argparse
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import build_parser, main
from tests.waiting import sentences


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
    "launch",
    "drill",
    "evaluate",
    "transfer",
    "lab",
    "report",
    "ui",
    "track import",
    "track status",
    "pull",
    "push",
    "average",
    "register",
    "unregister",
    "classify",
    "export",
    "plan",
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
        ("data prepare cifar10 --source {tmp} --out {tmp}/x", "the source"),
        ("data prepare images --out {tmp}/x", "source"),
        ("data verify {tmp}/nothing", "nothing"),
        ("pretrain nfnet_tiny_glyph --out {tmp}/x", "did you mean 'nfnet_tiny_glyphs'"),
        ("pretrain nfnet_tiny_glyphs", "--out"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x", "no data"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x --data.url {tmp}/nothing", "nothing"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x --optim.learning_rat 1", "did you mean --optim.learning_rate?"),
        ("pretrain nfnet_tiny_glyphs --out {tmp}/x --seed", "needs a value"),
        ("pretrain {tmp}/nothing.yaml --out {tmp}/x", "no file"),
        ("inspect nfnet_f44", "nfnet_f4"),
        ("inspect timm:resnetv2_5", "resnetv2_50"),
        ("inspect timm:vgg11 --signal {tmp}/x.png --px 32", "no residual blocks"),
        ("inspect timm:vit_tiny_patch16_224 --signal {tmp}/x.png", "tokens"),
        ("inspect nfnet_tiny --px 0", "--px is 0"),
        ("inspect nfnet_tiny --signal {tmp}/x.gif", ".png"),
        ("inspect nfnet_tiny --signal {tmp}/x.png --device nothing", "--device"),
        ("inspect nfnet_tiny --signal {tmp}/x.png --skip-init nan", "--skip-init"),
        ("evaluate {tmp}/nothing {tmp}/x", "no checkpoint at"),
        ("transfer {tmp}/nothing --suite demo --data-root {tmp} --out {tmp}/x", "digits: not prepared"),
        ("transfer {tmp}/nothing --suite dem --data-root {tmp} --out {tmp}/x", "demo"),
        ("report {tmp}/nothing", "nothing"),
        ("classify {tmp}/nothing {tmp}", "no images at"),
        ("classify {tmp}/nothing x.png", "no checkpoint at"),
        ("classify {tmp}/nothing x.png --top 0", "--top is 0"),
        ("export {tmp}/nothing --format onnx --out {tmp}/x", "no checkpoint at"),
        ("export {tmp}/nothing --format onn --out {tmp}/x", "onnx"),
        ("export {tmp}/nothing --format onnx --out {tmp}/x --tolerance -1", "--tolerance is -1"),
        ("export {tmp} --format onnx --out .", "is not empty"),
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
    (sentence,) = sentences(err)
    assert sentence.startswith("normfree: ") and message in sentence
    assert not (tmp_path / "x" / "manifest.json").exists() and not (tmp_path / "x" / "run.yaml").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR])
def test_a_full_or_read_only_place_is_no_fault_of_ours(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_: Any) -> int:
        raise OSError(number, os.strerror(number), "/there/scorecard.html")

    monkeypatch.setattr("orchestration.commands.report.report", refused)
    code, _, err = run("report sweep", capsys)
    assert code == 2 and err == (
        f"normfree: /there/scorecard.html: {os.strerror(number)}; mend that, or give another place "
        "(temporary files: TMPDIR, caches: NORMFREE_CACHE)\n"
    )


CHECKED_LATER = {
    *("--px", "--top", "--tolerance", "--skip-init", "--seeds", "--max-concurrent", "--gpus-per-trial"),
    *("--processes-per-trial", "--num-processes", "--val-share", "--max-bad-share", "--shard-mb", "--shard-samples"),
    *("--resize-shortest", "--resize-longest", "--jpeg-quality", "--workers", "--seed", "--max-restarts"),
}
"""By what they decide, which names them too."""


def test_every_number_of_the_command_line_has_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    parsers, seen = [build_parser()], 0
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.type in (int, float):
                assert CHECKED_LATER & set(action.option_strings), action
            elif action.type not in (None, str):
                seen += 1
                for text in ("-1", "nan", "1e400", "9" * 5000, "x"):
                    with pytest.raises(argparse.ArgumentTypeError, match=r"give a (whole )?number"):
                        action.type(text)  # type: ignore[operator]
    assert seen > 8
    code, _, err = run("data bench nothing --seconds 0", capsys)
    assert code == 2 and "--seconds: '0'; give a number of 0.1 or more" in err


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "läufe-日"),
        ({"PYTHONIOENCODING": "ascii"}, r"l\xe4ufe-\u65e5"),
    ],
)
def test_a_locale_of_ascii_keeps_names_and_is_no_fault_of_ours(
    environment: dict[str, str], shown: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "orchestration.cli", "data", "verify", "läufe-日"]
    found = subprocess.run(command, env={**os.environ, **environment}, capture_output=True)
    assert found.returncode == 2 and shown in found.stderr.decode() and b"fault of ours" not in found.stderr


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


def test_inspect_writes_one_json_object_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "signal.png"
    code, out, _ = run(f"inspect nfnet_tiny --json --signal {picture} --px 24 --batch 4", capsys)
    report = json.loads(out)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    assert [s["depth"] for s in report["stages"]] == [1, 2, 2] and report["num_features"] == 768
    memory = report["activation_memory"]
    assert memory["batch"] == 4 and memory["bf16"]["kept_bytes"] > memory["bf16"]["checkpointed_bytes"] > 0
    signal = report["signal"]
    assert len(signal["measured"]["variance"]) == 6 and len(signal["predicted_on_noise"]["variance"]) == 6
    assert signal["predicted"]["variance"] == pytest.approx([1, 1.04, 1.04, 1.08, 1.04, 1.08])


def test_inspect_takes_a_peer_and_a_network_without_a_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(f"inspect timm:resnet18 --json --signal {tmp_path}/peer.svg --px 48 --batch 2", capsys)
    report = json.loads(out)
    # 11.69 M parameters and 1.82 G multiply-adds at 224 px: timm's own table.
    assert code == 0 and round(report["num_parameters"] / 1e6, 2) == 11.69
    assert round(report["multiply_adds"][0]["count"] / 1e9, 2) == 1.81
    assert report["signal"]["predicted"]["variance"][0] is None and (tmp_path / "peer.svg").exists()
    code, out, _ = run(f"inspect timm:resnetv2_50x1_bit --json --signal {tmp_path}/bit.png --px 32 --batch 2", capsys)
    assert code == 0 and json.loads(out)["signal"]["predicted"] is None


def test_the_same_seed_draws_the_same_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(f"inspect nfnet_tiny --signal {tmp_path}/{name}.png --px 16 --batch 2 --seed {seed}", capsys)[0] == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_show_prints_the_resolved_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("pretrain --optim.learning_rate 0.125 nfnet_tiny_glyphs --show --engine.zero_stage=1", capsys)
    assert code == 0 and "learning_rate: 0.125" in out and "zero_stage: 1" in out


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("--epochs", "--duration"), ("--lr", "--optim.learning_rate"), ("-lr", "--optim.learning_rate"),
        ("--batch-size", "--global_batch"), ("--optim.lr", "--optim.learning_rate"), ("--gpus", "--num-processes"),
        ("--num_processes", "--num-processes"), ("--tracking", "--tracking-uri"), ("--global-batch", "--global_batch"),
        ("--Optim.Momentum", "--optim.momentum"), ("--model.option.drop_rate", "--model.options.drop_rate"),
    ],
)  # fmt: skip
def test_the_words_of_other_programs_lead_to_ours(word: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (f"pretrain nfnet_tiny_glyphs {word} 3 --show", f"pretrain {word} 3 nfnet_tiny_glyphs --show"):
        code, _, err = run(words, capsys)
        assert code == 2 and f"did you mean {right}" in err


def test_the_overview_the_version_and_help_as_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("", capsys)
    assert code == 2 and not out and "transfer" in err
    code, overview, _ = run("--help", capsys)
    assert code == 0 and run("help", capsys)[:2] == (0, overview) and overview == err
    assert run("help pretrain", capsys) == run("pretrain --help", capsys)
    code, out, _ = run("--version", capsys)
    assert code == 0 and out.startswith("normfree 0.")
    code, _, err = run("pretran x", capsys)
    assert code == 2 and "did you mean pretrain?" in err


def test_help_breaks_no_word_in_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        _, out, _ = run(f"{command} --help", capsys)
        assert not [line for line in out.partition("examples:")[0].splitlines() if line.endswith("-") or len(line) > 80]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--duration '20 steps' --optim.warmup '30 steps'", "--optim.warmup"),
        ("--duration '20 epochs' --optim.warmup '2600 samples' --data.url {digits}", ""),
        ("--duration '5 steps' --optim.warmup '1 epochs' --data.url {digits}", "--optim.warmup"),
        ("--global_batch 127 --num-processes 2", "global_batch"),
        ("--global_batch 126 --data.repeats 4", "data.repeats"),
        ("--micro_batch 3 --global_batch 9 --augment.mixup_alpha 0.2", "micro_batch"),
        ("--optim.final_learning_rate 0.5", "optim.final_learning_rate"),
        ("--augment.area_min 0.9 --augment.area_max 0.5", "augment.area_min"),
        ("--saving.keep_best 1 --data.eval_split none", "saving.keep_best"),
        ("--model.name nfnet_f99", "nfnet_f9"),
        ("--model.options.drop_rate lots", "model.options.drop_rate"),
        ("--model.name timm:vit_tiny_patch16_224 --model.options.depth 2", "augment.image_px"),
        ("--model.name timm:vit_tiny_patch16_224 --augment.image_px 224", ""),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_starts(
    words: str, option: str, digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"pretrain nfnet_tiny_glyphs {words.format(digits=digits)}"
    code, _, err = run(f"{words} --show", capsys)
    assert (code, option in err) == (2 if option else 0, True), err
    if option:
        data = "" if "--data.url" in words else f"--data.url {digits}"
        assert run(f"{words} {data} --out {tmp_path / 'x'}", capsys)[0] == 2 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "used"), [([], "http://night:5000"), (["--tracking-uri", "http://mine:5000"], "http://mine:5000")]
)
def test_a_run_goes_to_the_tracker_that_the_environment_names_as_every_other_command_does(
    given: list[str], used: str, digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("orchestration.launch.local.pretrain", lambda run, out, **named: seen.append(named) or 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://night:5000")
    assert main(["pretrain", "nfnet_tiny_glyphs", "--data.url", digits, "--out", str(tmp_path / "run"), *given]) == 0
    assert seen[0]["tracking_uri"] == used


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("vit_tiny_patch16_224", "12 blocks, width 192, 197 tokens"), ("deit_tiny_patch16_224", "1.254 G multiply-adds"),
        ("swin_tiny_patch4_window7_224", "6 blocks, width 384, maps of 14x14"), ("tf_efficientnet_b0", "0.386 G multiply-adds"),
        ("mobilenetv3_small_100", "width 96"), ("vgg11", "stages: not known"),
    ],
)  # fmt: skip
def test_inspect_reads_networks_of_every_make(name: str, stages: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(f"inspect timm:{name}", capsys)
    assert code == 0, err
    assert stages in out and "parameters" in out and "fp32: " in out
