"""Options of `normfree launch`: what `pretrain` takes is handed on in every form, and what a form does not read is refused."""

import os
import shlex
from pathlib import Path

import pytest
import yaml

from orchestration.cli import build_parser, main
from orchestration.clusters import slurm

RECIPE = "launch nfnet_tiny_glyphs --data.url s3://b/glyphs --out s3://b/runs/a"
SWEEP = "launch transfer --image a -- s3://b/c --suite demo --data-root s3://b/d --out s3://b/s"


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(words)) == 0
    return capsys.readouterr().out


def test_what_pretrain_takes_launch_takes() -> None:
    parser = build_parser()
    of_one_machine = {"--list", "--show", "--help-fields", "--num-processes"}
    assert set(parser.command("pretrain").options()) - set(parser.command("launch").options()) == of_one_machine


@pytest.mark.parametrize("how", ["option", "variable"])
def test_profiled_steps_reach_the_hosts(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"{RECIPE} --profile 4:6"
    if how == "variable":
        words = RECIPE
        monkeypatch.setenv("NORMFREE_PROFILE", "4:6")
    assert "  NORMFREE_PROFILE=4:6" in printed(f"{words} --hosts a,b --dry-run", capsys).splitlines()
    found = list(yaml.safe_load_all(printed(f"{words} --kubernetes --nodes 2 --image a", capsys)))
    agent = found[-1]["spec"]["replicatedJobs"][1]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "NORMFREE_PROFILE", "value": "4:6"} in agent["env"]


def test_profiled_steps_reach_a_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this process's variables, which sbatch hands on."""
    got: list[str] = []

    def submit(*_: object, **__: object) -> str:
        got.append(os.environ["NORMFREE_PROFILE"])
        return "submitted"

    for name in ("NORMFREE_PROFILE", "PATH", "NORMFREE_TRACKING_URI", "PYTHONUTF8"):
        monkeypatch.setenv(name, "")  # and as it was afterwards
    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr("orchestration.commands.train.checked", lambda *_: "")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(f"{RECIPE} --slurm --nodes 2 --profile 3")) == 0
    assert got == ["3"]


def test_a_torchrun_line_hands_on_what_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(f"--debug {RECIPE} --torchrun --hosts a,b --profile 3 --tracking-uri http://t:5000 --seed 3", capsys)
    words = shlex.split(out.splitlines()[0])
    asked = build_parser().parse_known_args(words[words.index("pretrain") :])[0]
    assert (asked.profile, asked.tracking_uri, "--debug" in words) == ("3", "http://t:5000", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{RECIPE} --hosts a,b --dry-run --profile 3:1", "ends before it begins"),
        (f"{RECIPE} --slurm --nodes 2 --dry-run --profile ''", "--profile has no steps"),
        (
            f"{RECIPE} --hosts a,b --dry-run --partition gpu",
            "--partition is for --slurm, and does nothing with --hosts",
        ),
        (f"{RECIPE} --hosts a,b --dry-run --nodes 3", "--nodes is for --slurm and --kubernetes"),
        (f"{RECIPE} --hosts a,b --dry-run --spot", "--spot is for --kubernetes"),
        (f"{RECIPE} --slurm --nodes 2 --dry-run --ssh-option Port=2", "--ssh-option is for --hosts"),
        (f"{RECIPE} --torchrun --hosts a,b --env HOME", "does nothing with --torchrun"),
        (f"{RECIPE} --kubernetes --nodes 2 --image a --python /opt/python", "--python is for --hosts and --slurm"),
        (
            SWEEP.replace("--image a", "--kubernetes --nodes 2 --image a --profile 3"),
            "--profile says nothing to a sweep",
        ),
        (SWEEP.replace("--image a", "--ray h:1 --image a"), "--image is for --kubernetes, and does nothing with --ray"),
        (SWEEP.replace("--image a", "--ray h:1 --hosts a,b"), "a sweep runs on Ray"),
    ],
)
def test_what_would_do_nothing_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(words)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("normfree: ")
