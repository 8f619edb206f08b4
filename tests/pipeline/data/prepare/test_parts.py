"""Work done in parts gives what one process gives; a part that is missing, or of other work, is refused."""

import hashlib
import json
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import parts
from pipeline.data.format.manifest import Manifest
from pipeline.data.parts import Part
from pipeline.data.prepare import plan_files
from pipeline.data.prepare import prepare as prepares
from pipeline.data.prepare.adopt import adopt
from pipeline.data.prepare.prepare import Preparation
from pipeline.data.sources.cards import load_card
from pipeline.data.sources.open_source import open_source
from pipeline.data.verify import overlap as overlaps
from pipeline.data.verify import verify as verifies
from pipeline.errors import UserError

ALL = [Part(number, 4) for number in (3, 1, 4, 2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for number in range(60):
        path = folder / f"{('train', 'val')[number % 2]}/c{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    out = tmp_path_factory.mktemp("whole") / "out"
    made = Preparation(card=load_card("images"), out=str(out), source=str(folder), shard_samples=7)
    made.run()
    return made


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def test_shards_written_in_parts_are_those_of_one_process(whole, tmp_path):
    made = replace(whole, out=str(tmp_path / "out"))
    assert sum(made.run_part(part) for part in ALL) == 10
    assert not (tmp_path / "out/manifest.json").exists()
    made.run(merge=True)
    assert contents(made.out) == contents(whole.out)
    assert made.run_part(ALL[0]) == 0


def test_parts_that_start_at_once_list_the_source_once(whole, tmp_path, monkeypatch):
    def opened(*args, **options):
        with (tmp_path / "listings").open("a") as file:
            file.write("1")
        time.sleep(1)  # the others ask meanwhile
        return open_source(*args, **options)

    monkeypatch.setattr(prepares, "open_source", opened)
    monkeypatch.setattr(plan_files, "FILE_IMAGES", 10)  # several files, of which a part reads its own
    monkeypatch.setattr(plan_files, "WAIT_S", 0.1)
    made = replace(whole, out=str(tmp_path / "out"))
    processes = [multiprocessing.get_context("fork").Process(target=made.run_part, args=(part,)) for part in ALL]
    [process.start() for process in processes]
    [process.join() for process in processes]
    made.run(merge=True)
    assert (tmp_path / "listings").read_text() == "1" and contents(made.out) == contents(whole.out)


def test_a_plan_of_another_source_is_not_taken_and_a_damaged_one_is_refused(whole, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(whole.source, source)
    made = replace(whole, out=str(tmp_path / "out"), source=str(source))
    made.run_part(ALL[0])
    (source / "train/c0/0.png").write_bytes(b"other")
    with pytest.raises(UserError, match=r"train/c0/0\.png has 5 bytes, and \d+ when the source was listed"):
        [made.run_part(part) for part in ALL[1:]]
    (tmp_path / "link").symlink_to(source)  # spelled otherwise: it is listed
    with pytest.raises(UserError, match=r"parts of another preparation \(source_fingerprint"):
        replace(made, source=str(tmp_path / "link")).run_part(ALL[1])
    folder = tmp_path / "out/PREPARING/plan"
    (plan,) = [path for path in folder.glob("*.json") if path.name != plan_files.NAME]
    forged = plan.read_bytes().replace(str(source).encode(), b"/etc")
    name = hashlib.sha256(forged).hexdigest()
    (folder / plan_files.NAME).write_text((folder / plan_files.NAME).read_text().replace(plan.stem, name))
    for content, sentence in ((b"", "is gone, or does not hold"), (forged, "names files outside")):
        (folder / f"{name}.json").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            made.run_part(ALL[1])


def test_a_plan_that_lost_shards_makes_no_smaller_dataset(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_files, "FILE_IMAGES", 10)
    made = replace(whole, out=str(tmp_path / "out"))
    [made.run_part(part) for part in ALL]
    file = tmp_path / "out/PREPARING/plan" / plan_files.NAME
    seal = json.loads(file.read_text())
    file.write_text(json.dumps({**seal, "files": seal["files"][:-1]}))
    with pytest.raises(UserError, match="is not whole any more"):
        made.run(merge=True)
    assert not (tmp_path / "out/manifest.json").exists()
    file.write_text(json.dumps(seal))
    made.run(merge=True)
    assert contents(made.out) == contents(whole.out)


def test_a_missing_part_is_refused_and_nothing_looks_whole(whole, tmp_path):
    made = replace(whole, out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds no part"):
        made.run(merge=True)
    for part in ALL[:2]:
        made.run_part(part)
    with pytest.raises(UserError, match=r"part 2/4 \(and 1 more\) is not done: run it with --part 2/4"):
        made.run(merge=True)
    for use in (adopt, Manifest.open):  # the shards that are there look like a dataset
        with pytest.raises(UserError, match="is not finished"):
            use(made.out)
    assert not (tmp_path / "out/manifest.json").exists()
    for part in ALL[2:]:
        made.run_part(part)
    assert made.run(merge=True).digest == Manifest.open(whole.out).digest


def test_parts_of_another_preparation_are_refused(whole, tmp_path):
    made = replace(whole, out=str(tmp_path / "out"))
    made.run_part(ALL[0])
    before = contents(made.out)
    with pytest.raises(UserError, match=r"holds parts of another preparation \(shard_samples 7\)"):
        replace(made, shard_samples=9).run_part(ALL[1])
    with pytest.raises(UserError, match="is a part of other work"):
        replace(made, shard_samples=9).run(merge=True)
    assert contents(made.out) == before


def test_tars_indexed_in_parts_have_the_index_of_one_process(whole, tmp_path):
    for path in Path(whole.out).glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for part in ALL[:3]:
        assert adopt(str(tmp_path), part=part) is None
    with pytest.raises(UserError, match="part 2/4 is not done"):
        adopt(str(tmp_path), merge=True)
    adopt(str(tmp_path), part=ALL[3])
    adopt(str(tmp_path), merge=True)
    for name in ("train-00000.rows.npy", "val-00000.keys.parquet"):
        assert (tmp_path / name).read_bytes() == (Path(whole.out) / name).read_bytes()


def test_parts_of_a_check_and_of_a_search_are_the_whole(whole):
    found = [verifies.verify(whole.out, part=part) for part in ALL]
    assert verifies.merged(found) == verifies.verify(whole.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlaps, "CHUNK_SAMPLES", 1)
        some = [overlaps.overlap(whole.out, whole.out, part=part) for part in ALL]
        merged, one = overlaps.merged(some), overlaps.overlap(whole.out, whole.out)
    assert {p for part in some for p in part.pairs} == set(one.pairs) == set(merged.pairs)
    assert merged.num_candidates == one.num_candidates and merged.num_b_found == one.num_b_found == 30


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/1000000"])
def test_a_share_that_is_none(text):
    with pytest.raises(UserError, match=r"write K/N with K from 1 to N"):
        Part.parse(text)


def test_shares_are_all_of_it_once(tmp_path):
    items = list(range(11))
    assert sorted(item for part in ALL for item in part.share(items)) == items
    parts.record(str(tmp_path), Part(1, 2), "w", {})
    parts.record(str(tmp_path), Part(1, 3), "w", {})
    with pytest.raises(UserError, match="parts of 2 and of 3"):
        parts.results(str(tmp_path), "w")
    parts.record(str(tmp_path), Part(2, 2), "w", {"second": 1})
    assert parts.results(str(tmp_path), "w") == [{}, {"second": 1}]  # of the division that is whole
