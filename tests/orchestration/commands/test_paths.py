"""Arguments that name a file or folder take any fsspec URL: here a store in memory; S3 in test_s3 and test_pull."""

import uuid
from pathlib import Path

import pytest

from orchestration.cli import main
from pipeline.data.sources.cards import datasets_dir, load_card
from pipeline.storage import objects
from transfer.protocol.suite_files import load_suite, suites_dir


@pytest.fixture
def root() -> str:
    return f"memory://{uuid.uuid4().hex}"


def put(local: Path, url: str) -> str:
    objects.write_bytes(url, local.read_bytes())
    return url


def test_cards_and_suites(root: str) -> None:
    assert load_card(put(datasets_dir() / "digits.yaml", f"{root}/mine.yaml")) == load_card("digits")
    assert load_suite(put(suites_dir() / "demo.yaml", f"{root}/suite.yaml")) == load_suite("demo")
    for load in (load_card, load_suite):
        with pytest.raises(objects.UserError, match=f"{root}/none.yaml"):
            load(f"{root}/none.yaml")


def test_recipes(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "nfnet_tiny_glyphs", "--show"]) == 0
    shown = capsys.readouterr().out
    objects.write_bytes(f"{root}/run.yaml", shown.encode())
    assert main(["pretrain", f"{root}/run.yaml", "--show"]) == 0
    plain = [line for line in shown.splitlines() if not line.startswith("#")]  # the recipe's header is not the file's
    assert capsys.readouterr().out.splitlines() == plain


def test_the_picture_of_signals(root: str) -> None:
    assert main(["inspect", "nfnet_tiny", "--px", "32", "--batch", "2", "--signal", f"{root}/a/signal.png"]) == 0
    assert objects.read_bytes(f"{root}/a/signal.png").startswith(b"\x89PNG")


def test_pairs_of_an_overlap(root: str, digits: str) -> None:
    words = ["data", "overlap", digits, digits, "--split-a", "val", "--no-confirm", "--radius", "0", "--show", "0"]
    assert main([*words, "--out", f"{root}/pairs.csv"]) == 0
    assert objects.read_bytes(f"{root}/pairs.csv").startswith(b"split_a") or b"key_a" in objects.read_bytes(
        f"{root}/pairs.csv"
    )
