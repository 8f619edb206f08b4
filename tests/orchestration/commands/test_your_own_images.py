"""docs/your-own-images.md: every command in it works when typed, and what it promises to say is said."""

import json
import re
import shlex
import shutil
import tarfile
import time
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.commands import output
from pipeline.data.images.formats import ENDINGS
from tests.pipeline.data.sources.test_parquet import parquet
from tests.pipeline.data.sources.trees import TREE, folder_of, image_bytes

PAGE = (Path(__file__).parents[3] / "docs" / "your-own-images.md").read_text()
COMMANDS = re.findall(r"^normfree .*$", "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)), re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the sources that the page names."""
    monkeypatch.chdir(tmp_path)
    photos = folder_of(tmp_path / "photos", TREE)
    with tarfile.open("photos.tar.gz", "w:gz") as tar:
        tar.add(photos, "photos")
    shutil.make_archive("photos", "zip", tmp_path, "photos")
    folder_of(tmp_path / "flat", [f"{name}/{number}.png" for name in ("ant", "bee") for number in range(5)])
    rows = [{"path": name, "label": name.split("/")[1], "split": name.split("/")[0]} for name in TREE]
    lines = ["path,label,split", *(",".join(row.values()) for row in rows)]
    (photos / "list.csv").write_text("\n".join(lines))
    tags = [f"{row['path']},{row['label']}|furry,{row['split']}" for row in rows]
    (photos / "tags.csv").write_text("\n".join(["path,label,split", *tags]))
    (tmp_path / "lists").mkdir()
    above = [{**row, "path": f"../photos/{row['path']}"} for row in rows]
    (tmp_path / "lists" / "elsewhere.jsonl").write_text("\n".join(map(json.dumps, above)))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train-00000-of-00001.parquet").write_bytes(parquet([0, 1, 0, 1], names=["ant", "bee"]))
    folder_of(tmp_path / "unlabelled_test", [*TREE, "test/1.png", "test/2.png"])
    damaged = folder_of(tmp_path / "damaged", [*TREE, "train/ant/9.png"])
    (damaged / "train/ant/9.png").write_bytes(image_bytes("x")[:60])
    return tmp_path


def test_every_command_works_when_typed(place, capsys):
    assert len(COMMANDS) >= 9 and all(command.startswith("normfree data ") for command in COMMANDS)
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        assert main([*words, "--workers", "1"] if "--workers" not in words else words) == 0, command
        said = capsys.readouterr()
        assert "val" in said.out or "--val-share" not in command


def test_what_the_page_says_of_endings_is_the_list(place):
    listed = re.search(r"Files that end with (.*?), in any case", PAGE, re.DOTALL)
    assert listed and re.findall(r"\b[a-z0-9]+\b", listed[1].replace(" or ", " ")) == list(ENDINGS)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["ant/1.png", "bee/1.png", "train/1.png"], "the folder train was taken for a class"),
        (
            ["ant/1.png", "bee/1.png"],
            "the source has no split folders, so every image is train unless val_share is given",
        ),
        (
            [*TREE, *(f"train/ant/{n}/1.png" for n in "ab")],
            "2 images lie in folders below their class folder: the upper",
        ),
        (
            [f"train/{name}/1.png" for name in ("Cat", "cat", "cow")] + ["val/Cat/2.png", "val/cat/2.png"],
            "these classes differ in case, spaces or Unicode form only: 'Cat', 'cat'",
        ),
        (
            [f"train/{name}/1.png" for name in ("ant", "bee", "cow")] + ["val/ant/2.png", "val/bee/2.png"],
            "val has no images of 1 of 3 classes (cow)",
        ),
    ],
)
def test_guesses_are_said_as_the_page_has_them(tmp_path, capsys, names, said):
    assert said in PAGE
    source = folder_of(tmp_path / "source", names)
    assert main(["data", "prepare", "images", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["training_set/ant/1.png", "test_set/ant/1.png"], "has folders that look like splits and are not called so"),
        (
            ["ant/train/1.png", "ant/val/2.png", "bee/train/3.png"],
            "has splits below a class folder (ant holds train, val)",
        ),
        (
            [f"{a}/{b}/1.png" for a in ("ill", "well") for b in ("images", "masks")],
            "has the same folders (images, masks) in each of its folders (ill, well)",
        ),
        ([*TREE, "train/overview.png"], "has an image outside the class folders (train/overview.png)"),
        (
            [*TREE, "test/1.png", "test/2.png"],
            "if test has no labels, remove it or name the other splits with --splits",
        ),
        ([*TREE, "train/cow/notes.txt"], "has no image in the class folder"),
    ],
)
def test_refusals_are_as_the_page_has_them(tmp_path, capsys, names, said):
    assert said in PAGE
    source = folder_of(tmp_path / "source", names)
    assert main(["data", "prepare", "images", "--source", str(source), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_work_without_a_terminal_is_not_silent(capsys, monkeypatch):
    monkeypatch.setattr(output, "QUIET_S", 0.01)
    with output.progress_bar("images", "images"):
        time.sleep(0.2)
    assert capsys.readouterr().err.startswith("images ... (")


@pytest.mark.parametrize(
    ("card", "command"),
    [
        ("shapes", "transfer CHECKPOINT --data made --out SWEEP"),
        ("shape_boxes", "transfer CHECKPOINT --data made --out SWEEP"),
        ("glyph_sets", "pretrain RECIPE --data.url made --optim.loss binary --out RUN"),
    ],
)
def test_the_next_command_is_one_that_takes_such_labels(card, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", card, "--out", "made", "--workers", "1"]) == 0
    assert f"next: normfree {command}\n" in capsys.readouterr().out
