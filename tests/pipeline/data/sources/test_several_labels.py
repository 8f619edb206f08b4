"""Several labels an image: the same from every form of list, refused where a list cannot mean it, and one label as before."""

import csv
import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from tests.pipeline.data.sources.trees import image_bytes

CARD = load_card("images").with_several_labels(";")
# (split, labels); labels of train are ant, bee and cow.
ROWS = [
    ("train", ["bee", "ant"]),
    ("train", ["ant"]),
    ("train", []),
    ("train", ["cow", "?ant"]),
    ("train", ["ant", "bee"]),
    ("val", ["cow", "bee", "ant"]),
    ("val", ["?cow"]),
]
TRUTH = {"train": [[1, 1, 0], [1, 0, 0], [0, 0, 0], [-1, 0, 1], [1, 1, 0]], "val": [[1, 1, 1], [0, 0, -1]]}


def images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(ROWS)):
        (folder / f"{number}.png").write_bytes(image_bytes(str(number)))
    return folder


def as_csv(folder):
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerows([("path", "label", "split"), *((f"{i}.png", ";".join(ls), s) for i, (s, ls) in enumerate(ROWS))])
    (images(folder) / "list.csv").write_text(buffer.getvalue())
    return folder / "list.csv"


def as_jsonl(folder, rows=ROWS):
    lines = [
        json.dumps({"path": f"{i}.png", "label": labels, "split": split}) for i, (split, labels) in enumerate(rows)
    ]
    (images(folder) / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def as_parquet(folder):
    """Of Hugging Face's Sequence(ClassLabel), whose numbers cannot leave a label open."""
    folder.mkdir(parents=True)
    names = ["ant", "bee", "cow"]
    described = {"info": {"features": {"label": {"feature": {"names": names}, "_type": "Sequence"}}}}
    for split in ("train", "val"):
        rows = [(i, labels) for i, (s, labels) in enumerate(ROWS) if s == split]
        numbers = [[names.index(label) for label in labels if label in names] for _, labels in rows]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pictures = pa.array([{"bytes": image_bytes(str(i)), "path": f"{i}.png"} for i, _ in rows], kind)
        table = pa.table({"image": pictures, "label": pa.array(numbers, pa.list_(pa.int64()))})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(described)}), folder / f"{split}.parquet"
        )
    return folder


def truth(found: Manifest, split: str) -> list[list[int]]:
    """By the number in the file's name."""
    index = found.split(split)
    order = np.argsort([str(key).rpartition("_")[2] for key in index.keys])
    assert found.targets is not None
    return found.targets[index.label][order].tolist()


@pytest.mark.parametrize("form", [as_csv, as_jsonl, as_parquet])
def test_every_form_of_list_gives_the_same_labels(tmp_path, form):
    found = prepare(CARD, str(tmp_path / "out"), source=str(form(tmp_path / "in")))
    assert found.outputs == ("ant", "bee", "cow")
    for split, rows in TRUTH.items():
        expected = np.array(rows) if form is not as_parquet else np.array(rows).clip(0)
        assert truth(found, split) == expected.tolist()
    assert ("1 images have no label" in found.source_note) == (form is not as_parquet)
    assert not verify(str(tmp_path / "out")).problems
    again = Manifest.open(str(tmp_path / "out"))
    assert again.digest == found.digest and again.labels == found.labels


@pytest.mark.parametrize(
    ("card", "rows", "message"),
    [
        (load_card("images"), ROWS, r"list.jsonl, line 1: label is a list of 2; .* --multi-label"),
        (CARD, [("train", ["ant"]), ("train", ["bee", "?bee"])], "line 2: bee is said to be there and to be unsure"),
        (CARD, [("train", ["ant", "a|b"])], r"line 1: 'a\|b' is no label"),
        (CARD, [("train", ["ant", "bee"]), ("val", ["dog"])], "val has classes that train lacks .dog, 1 in all"),
        (CARD, [("train", ["ant", "?bee"])], "the class bee has no image in train"),
        (
            dataclasses.replace(CARD, num_classes=2, classes=("ant", "bee")),
            [("train", ["ant", "bee"]), ("train", ["ant", "wasp"])],
            "line 2: wasp is none of the 2 labels of the card",
        ),
    ],
)
def test_what_a_list_cannot_mean_is_refused(tmp_path, card, rows, message):
    with pytest.raises(UserError, match=message):
        prepare(card, str(tmp_path / "out"), source=str(as_jsonl(tmp_path / "in", rows)))


def test_folders_and_odd_separators_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a list"):
        prepare(CARD, str(tmp_path / "out"), source=str(images(tmp_path / "train" / "ant").parents[1]))
    for separator in ("", "?"):
        with pytest.raises(UserError, match="give what stands between"):
            load_card("images").with_several_labels(separator)


def test_a_dataset_with_one_label_an_image_is_the_same_bytes_as_before(digits):
    """Its manifest says nothing of labels, and its digest is what version 1913a00 gave the same shards."""
    found = Manifest.open(digits)
    assert found.digest == "e3a753360a97ef3e67e8e47f5a6c14e56c113400cde3def1af50df731b5f9833"
    assert not found.labels and b'"labels"' not in found.to_json() and found.outputs == found.classes
