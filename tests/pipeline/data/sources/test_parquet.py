"""Parquet: labels that are no class, sizes out of proportion, and files that are none."""

import io
import json

import pytest

from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from tests.fuzzing import fuzz, mutants
from tests.pipeline.data.sources.trees import CARD, image_bytes


def parquet(labels, *, names=None, metadata=None, images=None, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = images or [image_bytes(str(number)) for number in range(len(labels))]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)]
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels)})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if names or metadata:
        text = metadata or json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **{"row_group_size": 4, **options})
    return buffer.getvalue()


def read(path):
    opened = open_source(CARD, str(path), spool=path.parent / "spool")
    list(opened.reader.read(opened.entries))
    return opened


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, -2], {"names": ["a", "b"]}, "row 2: the label -2 is none of the classes 0 to 1"),
        ([0, 1, 7], {"names": ["a", "b"]}, "row 2: the label 7 is none of the classes 0 to 1"),
        ([0, 1, -2], {}, "row 2: the label -2 is none"),
        ([0.5, 1.0], {}, "row 0: the label is float"),
        ([True, False], {}, "row 0: the label is bool"),
        (["a", "b"], {"metadata": '{"info":' * 100_000}, "metadata of Hugging Face in"),
        (["a", "b"], {"images": [bytes(80 << 20)] * 2, "compression": "zstd"}, "unpacks from"),
    ],
)
def test_what_is_no_class_or_no_image_is_refused(tmp_path, labels, options, message):
    (tmp_path / "a.parquet").write_bytes(parquet(labels, **options))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.parquet")


def test_a_dictionary_that_says_one_image_a_thousand_times_is_bounded(tmp_path):
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 26, "row_group_size": 1000}
    data = parquet(["a", "b"] * 500, images=[bytes(1 << 20)] * 1000, **options)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match="unpacks to more than"):
        read(tmp_path / "a.parquet")
    assert not list((tmp_path / "spool").iterdir())


def test_minus_one_is_no_label_and_counted(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([0, 1, -1], names=["\ufeffa", "b"]))
    opened = read(tmp_path / "a.parquet")
    assert opened.classes == ("a", "b") and "1 rows without a label" in opened.note


def test_rows_that_a_page_does_not_hold_are_not_left_out_in_silence(tmp_path):
    good = parquet([0, 1] * 5 + [0], compression="none", use_dictionary=False, row_group_size=11)
    said = set()
    for place in [n for n, byte in enumerate(good) if byte == 22]:  # 11, as parquet writes it
        path = tmp_path / f"{place}.parquet"
        path.write_bytes(good[:place] + bytes([20]) + good[place + 1 :])
        try:
            assert len(read(path).entries) == 11
        except UserError as refused:
            said.add(str(refused))
    assert any("rows of" in words and "where it says" in words for words in said), said


SEEDS = [
    parquet([0, 1, 0, 1, 1, -1], names=["ant", "bee"]),
    parquet(["ant", "bee", "ant", None], compression="zstd"),
    parquet([0, 1, 1], compression="none", use_dictionary=False),
]


@pytest.mark.parametrize("num", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_parquet_is_read_or_refused(tmp_path, num):
    place = tmp_path / "in"
    place.mkdir()

    def one(data):
        path = place / "a.parquet"
        path.write_bytes(data)
        for spooled in (place / "spool").glob("*"):
            spooled.unlink()
        read(path)

    # Most changes near the end, where the description is: the file is read from there.
    turned = [seed[::-1] for seed in SEEDS]
    both = [*mutants(SEEDS, num // 2), *(data[::-1] for data in mutants(turned, num // 2, seed=1))]
    counts = fuzz(one, both, place)
    assert counts["read"] > num / 50 and counts["refused"] > num / 20


def splits(folder, names):
    folder.mkdir()
    for name in names:
        data = parquet(["a", "b"], images=[image_bytes(f"{name}{i}") for i in range(2)])
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return {entry.split for entry in open_source(CARD, str(folder), spool=folder.parent / "spool").entries}


def test_the_split_is_a_word_of_the_name_wherever_it_stands(tmp_path):
    assert splits(tmp_path / "a", ["set1k-train-00.parquet", "set1k-validation-00.parquet"]) == {"train", "val"}
    assert splits(tmp_path / "b", ["train/0.parquet", "test/0.parquet"]) == {"train", "test"}
    assert splits(tmp_path / "test_c", ["0000.parquet", "0001.parquet"]) == {"train"}
    for names in (["train-0.parquet", "rest-0.parquet"], ["a-0.parquet", "eval-0.parquet"]):
        with pytest.raises(UserError, match=f"not clear which split .*{names[1]} belongs to"):
            splits(tmp_path / f"of {names[1]}", names)


def test_a_column_that_seems_to_tell_splits_is_not_passed_over(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(parquet(["a", "b"]))).append_column("split", pa.array(["train", "val"]))
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a column split that seems to tell splits"):
        read(tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "train.parquet")
    assert {entry.split for entry in read(tmp_path / "train.parquet").entries} == {"train"}
