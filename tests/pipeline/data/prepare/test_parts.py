"""Work done in parts gives what one process gives; a part that is missing, or of other work, is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import parts
from pipeline.data.format.manifest import Manifest
from pipeline.data.parts import Part
from pipeline.data.prepare.adopt import adopt
from pipeline.data.prepare.prepare import Preparation
from pipeline.data.sources.cards import load_card
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
