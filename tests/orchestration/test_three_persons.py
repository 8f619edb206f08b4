"""Three persons' first hours, typed as README and --help have it, each command a process of its own, no source file opened."""

import csv
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from orchestration.cli import main
from tests.orchestration.pages import find_browser, look
from tests.s3_server import bucket


def photos(folder: Path, *, splits: tuple[str, ...] = ("train", "val"), num: int = 14) -> Path:
    """Three kinds of photographs, told apart by their colour."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name, colour in (("n01440764", (200, 40, 40)), ("n01443537", (40, 200, 40)), ("n01484850", (40, 40, 200))):
            (folder / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = np.clip(np.array(colour) + rng.normal(0, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{name}_{i}.jpg")
    return folder


def typed(line: str, cwd: Path, code: int = 0) -> str:
    """What a command says."""
    words = [sys.executable, "-m", "orchestration.cli", *line.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def seen(page: Path) -> str:
    """A page as a real browser has it after its script has run."""
    if find_browser() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return look(page.as_uri())


def weights(folder: Path, name: str) -> str:
    torch.save(timm.create_model(name).state_dict(), folder / f"{name}.pth")
    return f"timm:{name}@{name}.pth"


@pytest.mark.slow
def test_a_folder_of_photos_and_a_backbone_of_timms(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    model = weights(tmp_path, "test_resnet")
    said = typed(f"transfer {model} --data photos --methods ridge --out sweeps/photos", tmp_path)
    assert "protocol (no --suite): ridge on frozen features at 1, 5, 10 images a class" in said
    rows = list(csv.DictReader((tmp_path / "sweeps/photos/report/scorecard.csv").open()))
    assert {row["method"] for row in rows} == {"ridge"} and {int(row["shots"]) for row in rows} == {1, 5, 10}
    page = seen(tmp_path / "sweeps/photos/report/scorecard.html")
    assert "<h1" in page and "photos" in page and "ridge on frozen features" in page


@pytest.mark.slow
def test_imagenet_like_tars_on_s3(tmp_path: Path) -> None:
    folder = photos(tmp_path / "raw", num=20)
    with bucket(tmp_path / "server") as place:
        with tarfile.open(tmp_path / "mine.tar", "w") as tar:
            tar.add(folder, arcname="mine")
        typed(f"data prepare images --source mine.tar --out {place}/mine", tmp_path)
        assert "every image decodes" in typed(f"data verify {place}/mine", tmp_path)
        typed(
            f"pretrain nfnet_tiny_cifar100 --data.url {place}/mine --out {place}/runs/first --duration 4steps --global_batch 12 "
            "--optim.warmup 1steps --eval_every 4steps --save_every 4steps",
            tmp_path,
        )
        assert "top-1" in typed(f"evaluate {place}/runs/first {place}/mine", tmp_path)


@pytest.mark.slow
def test_somebody_elses_half_finished_sweep_is_continued_and_reported(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    line = f"transfer {weights(tmp_path, 'test_resnet')} --data photos --methods ridge,knn --out sweeps/theirs"
    said = typed(f"{line} --budget 1trials", tmp_path)
    assert "the budget of 1 trials is spent" in said
    assert "left" in typed("status sweeps/theirs", tmp_path) or (tmp_path / "sweeps/theirs/sweep.json").is_file()
    done = len(list((tmp_path / "sweeps/theirs/trials").glob("*.json")))
    typed(line, tmp_path)
    assert len(list((tmp_path / "sweeps/theirs/trials").glob("*.json"))) > done > 0
    typed("report sweeps/theirs --out report", tmp_path)
    rows = list(csv.DictReader((tmp_path / "report/scorecard.csv").open()))
    assert {row["method"] for row in rows} == {"ridge", "knn"} and not any(row["damage"] for row in rows)
    assert "nearest neighbours" in seen(tmp_path / "report/scorecard.html")
    typed("report --all sweeps", tmp_path)
    board = seen(tmp_path / "sweeps/leaderboard.html")
    assert f"{len(rows)} results of 1 sweep<" in board and f"{len(rows)} of {len(rows)} results" in board


@pytest.mark.parametrize(
    "line",
    [
        "transfer --help",
        "data prepare --help",
        "suites",
        "report --help",
    ],
)
def test_what_these_persons_read_is_there(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(line.split())
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr().out
    assert code == 0 and ("normfree" in said)
