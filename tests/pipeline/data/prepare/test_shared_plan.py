"""Every form of a source is listed once for all parts of its preparation; what they write is what one process writes."""

import hashlib
import json
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.parts import Part
from pipeline.data.prepare import plan_files, shard_writer
from pipeline.data.prepare import prepare as prepares
from pipeline.data.prepare.prepare import Preparation
from pipeline.data.sources.cards import Card, load_card
from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from pipeline.storage import objects
from tests.pipeline.data.sources import test_boxes, test_several_labels
from tests.pipeline.data.sources.test_mask_folders import ade
from tests.pipeline.data.sources.test_parquet import parquet
from tests.pipeline.data.sources.trees import CARD, TREE, folder_of, image_bytes
from tests.pipeline.storage.test_stream import Store, store  # noqa: F401

PARTS = [Part(number, 3) for number in (2, 3, 1)]


def a_list(folder: Path) -> Path:
    """With an image that is missing and one that may not be read."""
    folder_of(folder / "images", TREE)
    names = [*TREE, "train/ant/gone.png", "../outside.png"]
    rows = [f"images/{name},{('ant', 'bee')['bee' in name]},{('train', 'val')['val' in name]}" for name in names]
    (folder / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    return folder / "list.csv"


def parquets(folder: Path) -> Path:
    (folder / "set").mkdir()
    for split in ("train", "val"):
        images = [image_bytes(f"{split}{number}") for number in range(6)]
        (folder / f"set/{split}.parquet").write_bytes(parquet(["ant", "bee"] * 3, images=images))
    return folder / "set"


def packed(root: Path) -> Path:
    path = root.with_name("packed.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(root, root.name)
    return path


FORMS: dict[str, tuple[Card, Callable[[Path], Path | str]]] = {
    "list": (CARD, a_list),
    "several labels": (test_several_labels.CARD, lambda folder: test_several_labels.as_jsonl(folder)),
    "parquet": (CARD, parquets),
    "compressed tar": (CARD, lambda folder: packed(folder_of(folder / "images", TREE))),
    "masks": (load_card("ade20k"), ade),
    "masks in a compressed tar": (load_card("ade20k"), lambda folder: packed(ade(folder))),
    "boxes": (test_boxes.CARD, lambda folder: test_boxes.list_of_boxes(folder, [test_boxes.BOX] * 2, [])),
    "COCO": (test_boxes.CARD, lambda folder: test_boxes.coco(folder / "coco")),
}


def contents(out: str) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def preparation(form: str, folder: Path) -> Preparation:
    card, make = FORMS[form]
    (folder / "source").mkdir()
    source = str(make(folder / "source"))
    return Preparation(card=card, out=str(folder / "out"), source=source, shard_samples=2, max_bad_share=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_any_source_list_it_once_and_a_killed_one_changes_nothing(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = preparation(form, tmp_path)
    whole = replace(made, out=str(tmp_path / "whole"))
    whole.run()
    listings = 0

    def counted(*args: object, **options: object) -> object:
        nonlocal listings
        listings += 1
        return open_source(*args, **options)  # type: ignore[arg-type]

    # One leaves a plan without its seal, one a whole plan and no shard.
    for killed_at in (plan_files.NAME, ".tar"):
        process = multiprocessing.get_context("fork").Process(target=killed, args=(made, killed_at))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    monkeypatch.setattr(prepares, "open_source", counted)
    assert sum(made.run_part(part) for part in PARTS) == len(list(Path(whole.out).glob("*.tar")))
    for copying in ("spooled", "unpacked"):  # a merge reads no image, and wants no copy of the source
        monkeypatch.setattr(f"pipeline.data.sources.open_source.{copying}", pytest.fail)
    made.run(merge=True)
    assert listings == 0 and contents(made.out) == contents(whole.out)


def killed(made: Preparation, ending: str) -> None:
    """A part that is killed where it writes, or publishes, what is called so."""
    part = os.getpid()

    def before(act: Callable[..., None], place: int) -> Callable[..., None]:
        def acts(*args: Any) -> None:
            if str(args[place]).endswith(ending):
                os.kill(part, signal.SIGKILL)
                time.sleep(60)  # a worker process ends with its parent
            act(*args)

        return acts

    objects.write_bytes = before(objects.write_bytes, 0)
    shard_writer.publish = before(shard_writer.publish, 1)
    made.run_part(PARTS[0])


@pytest.mark.parametrize("form", ["list", "parquet"])
def test_a_source_in_a_bucket_is_listed_once(form: str, store: Store, tmp_path: Path) -> None:  # noqa: F811
    made = preparation(form, tmp_path)
    bucket = f"s3://bucket/{form}"
    for path in (tmp_path / "source").rglob("*"):
        if path.is_file():
            objects.write_bytes(f"{bucket}/{path.relative_to(tmp_path / 'source')}", path.read_bytes())
    made = replace(made, source=(made.source or "").replace(str(tmp_path / "source"), bucket))
    whole = replace(made, out=str(tmp_path / "whole"))
    whole.run()
    made.run_part(PARTS[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepares, "open_source", pytest.fail)
        for part in PARTS[1:]:
            made.run_part(part)
        made.run(merge=True)
    assert contents(made.out) == contents(whole.out)


@pytest.mark.parametrize("form", ["parquet", "compressed tar"])
def test_a_merge_that_lacks_a_shard_writes_it_out_of_a_copy_of_its_own(form: str, tmp_path: Path) -> None:
    made = preparation(form, tmp_path)
    assert sum(map(made.run_part, PARTS))
    before = {name: data for name, data in contents(made.out).items() if name.endswith(".tar")}
    (tmp_path / "out/train-000000.tar").unlink()
    made.run(merge=True)
    assert {name: data for name, data in contents(made.out).items() if name.endswith(".tar")} == before


@pytest.mark.parametrize("form", ["list", "parquet", "boxes", "COCO"])
def test_the_plan_of_another_source_is_refused(form: str, tmp_path: Path) -> None:
    made = preparation(form, tmp_path)
    made.run_part(PARTS[0])
    for path in sorted((tmp_path / "source").rglob("*")):
        if path.suffix == ".parquet":
            path.write_bytes(parquet(["bee", "ant", "bee"]))
        elif path.suffix in (".csv", ".jsonl", ".json") and "captions" not in path.name:  # as many bytes as before
            data = path.read_bytes().replace(b"ant/1.png,ant", b"ant/1.png,bee")
            path.write_bytes(data.replace(b"disc", b"ring").replace(b'"category_id": 4', b'"category_id": 7'))
    with pytest.raises(UserError, match=r"parts of another preparation \(source_fingerprint"):
        made.run_part(PARTS[1])


def test_a_mask_that_changed_since_the_listing_is_refused(tmp_path: Path) -> None:
    made = preparation("masks", tmp_path)
    made.run_part(PARTS[0])
    for path in Path(made.source or "").rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"its mask has \d+ bytes, and \d+ when the source was listed"):
        made.run_part(PARTS[1])


@pytest.mark.parametrize("place", ["/etc/hostname", "images/train/ant/0.png", "s3://bucket/a.png"])
def test_a_plan_names_nothing_that_the_list_could_not(place: str, tmp_path: Path) -> None:
    made = preparation("list", tmp_path)
    made.run_part(PARTS[0])
    folder = tmp_path / "out/PREPARING/plan"
    (plan,) = [path for path in folder.glob("*.json") if path.name != plan_files.NAME]
    real = str(Path(made.source or "").parent / "images/train/ant/0.png")
    forged = plan.read_bytes().replace(json.dumps(real).encode(), json.dumps(place).encode())
    name = hashlib.sha256(forged).hexdigest()
    (folder / f"{name}.json").write_bytes(forged)
    (folder / plan_files.NAME).write_text((folder / plan_files.NAME).read_text().replace(plan.stem, name))
    with pytest.raises(UserError, match="names files outside"):
        [made.run_part(part) for part in PARTS[1:]]
