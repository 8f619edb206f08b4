"""Lists: what a row may say, and what it may name."""

import json
import os
from pathlib import Path

import pytest

from pipeline.data.sources import csv_jsonl
from pipeline.data.sources.csv_jsonl import read_classes
from pipeline.data.sources.entry import Unreadable
from pipeline.data.sources.list_access import AllowedPlaces, is_link_local
from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from tests.fuzzing import fuzz, mutants
from tests.pipeline.data.sources.trees import CARD, TREE, folder_of, found, note

GOOD = [{"path": name, "label": name.split("/")[1], "split": name.split("/")[0]} for name in TREE]


@pytest.fixture
def images(tmp_path):
    return folder_of(tmp_path / "images", TREE)


def jsonl(folder, rows):
    (folder / "list.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder / "list.jsonl"


def reasons(source, **options):
    opened = open_source(CARD, str(source), **options)
    return [str(data) for data in opened.reader.read(opened.entries) if isinstance(data, Unreadable)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": ["ant", "animal"]}, "line 9: label is a list of 2; give one, or say with --multi-label"),
        ({"label": {"name": "ant"}}, "line 9: label must be text or a whole number"),
        ({"label": True}, "line 9: label must be text or a whole number"),
        ({"label": 1.5}, "line 9: label must be text or a whole number"),
        ({"path": ["a.png"]}, "line 9: path must be text"),
        ({"label": "x" * 5000}, "line 9: label has 5000 characters"),
        ({"path": "a\0.png"}, "line 9: path has a control character"),
        ({"label": "a\nb"}, "line 9: label has a control character"),
        ({"path": "./train/ant/0.png"}, "line 9: ./train/ant/0.png is on line 1 already"),
        ({"path": "train/../train/ant/0.png"}, "is on line 1 already"),
    ],
)
def test_a_row_that_means_nothing_is_refused_with_its_line(images, row, message):
    with pytest.raises(UserError, match=message):
        found(jsonl(images, [*GOOD, {"path": "a.png", "label": "ant", **row}]))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"path": "a.png", "label": ' + "9" * 5000 + "}", '{"path": ', "[1]"])
def test_a_line_that_is_no_object_is_refused(images, text):
    (images / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match="line 1"):
        found(images / "a.jsonl")


def test_marks_of_byte_order_and_odd_ends_of_lines_are_no_part_of_names(images):
    rows = [{**row, "label": "\ufeff" + row["label"]} for row in GOOD]
    assert open_source(CARD, str(jsonl(images, rows))).classes == ("ant", "bee")
    odd = [{**row, "label": row["label"] + "\u2028x"} for row in GOOD]
    assert set(open_source(CARD, str(jsonl(images, odd))).classes) == {"ant\u2028x", "bee\u2028x"}
    for end in ("\r", "\r\n"):
        lines = ["path,label,split", *(",".join(row.values()) for row in GOOD)]
        (images / "a.csv").write_bytes(end.join(lines).encode("utf-8-sig"))
        assert len(found(images / "a.csv")) == len(TREE)


def test_numbers_of_any_length_are_in_numeric_order(images):
    labels = ["9" * 3000, "10", "9", "٣"]
    rows = [{"path": name, "label": label} for name, label in zip(TREE, labels, strict=False)]
    assert open_source(CARD, str(jsonl(images, rows[:3]))).classes == ("9", "10", "9" * 3000)
    assert open_source(CARD, str(jsonl(images, rows))).classes == tuple(sorted(labels))


@pytest.mark.parametrize(
    "text", ["path,label\n" + "x" * 200_000 + ",a\n", 'path,label\n"' + "x" * 200_000, "path,path,label\na,b,c\n"]
)
def test_a_csv_that_is_none_is_refused(images, text):
    (images / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"a\.csv"):
        found(images / "a.csv")


def test_only_what_lies_below_the_list_is_read_and_the_rest_is_counted(images, tmp_path, monkeypatch):
    private = folder_of(tmp_path / "private", ["scan.png"]) / "scan.png"
    (images / "link.png").symlink_to(private)
    (images / "linked").symlink_to(private.parent)
    monkeypatch.setenv("HOME", str(private.parent))
    os.mkfifo(images / "pipe.png")
    outside = ["../private/scan.png", "/dev/zero", "/etc/passwd", "http://127.0.0.1:1/a.png", "s3://other/a.png"]
    outside += [
        "local:///etc/hostname",
        "reference:///etc/hostname",
        "github://a:b@/x",
        "FILE:///etc/hostname",
        "file://~nobody-here/a.png",
    ]
    chains = ["simplecache::http://127.0.0.1:1/a.png", "zip://a.png::http://127.0.0.1:1/a.zip"]
    special = {"pipe.png": "a device, pipe or other special file, no image", "train/ant": "a folder, no image"}
    names = [*outside, *chains, *special, "none.png"]
    source = jsonl(images, [*GOOD, *({"path": name, "label": "ant", "split": "train"} for name in names)])
    said = reasons(source)
    assert [text for text in said if "--allow-root" in text] == said[: len(outside)]
    assert said[len(outside) :] == ["a chain of addresses, which is not read"] * 2 + [*special.values(), "no such file"]
    assert f"{len(names)} rows of the list name what is not read" in open_source(CARD, str(source)).note
    for name in ("link.png", "linked/scan.png", "~/scan.png", f"file://{private}"):
        assert "--allow-root" in reasons(jsonl(images, [*GOOD, {"path": name, "label": "ant", "split": "val"}]))[0]
        assert reasons(source, allow_roots=[str(private.parent)]) == []


def test_addresses_are_read_below_an_allowed_root_only(images):
    places = AllowedPlaces(str(images / "a.csv"), ["s3://bucket/photos", "https://1.1.1.1/set/"])
    inside = ["s3://bucket/photos/a.png", "S3://bucket/photos/./b//c.png", "https://1.1.1.1/set/a.png?x=1"]
    outside = ["s3://bucket/photos2/a.png", "s3://bucket/photos/../a.png", "https://1.1.1.1/set/%2e%2E/a.png"]
    outside += [
        "https://1.1.1.1/set/..%2Fa.png",
        "https://1.1.1.1@example.org/set/a.png",
        "s3://bucket/a.png",
        "http://1.1.1.1/set/a",
    ]
    assert [type(places.locate(path)[1]).__name__ for path in inside] == ["Whole"] * 3
    assert [type(places.locate(path)[1]).__name__ for path in outside] == ["Refused"] * len(outside)
    remote = AllowedPlaces("s3://bucket/lists/a.csv")
    assert [type(remote.locate(path)[1]).__name__ for path in ("a.png", "../a.png", "/etc/passwd", "~/a.png")] == [
        "Whole", "Refused", "Refused", "Refused"
    ]  # fmt: skip


def test_class_files(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffant\r\nbee\u2028x\n\ncow ".encode())
    assert read_classes(str(path)) == ["ant", "bee\u2028x", "cow"]
    for data, message in ((b"a\nb\na", "line 3: a is on line 1"), (b"\xff", "not UTF-8"), (b"a\x1b[2J", "control")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_classes(str(path))


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.170.2",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "2852039166",
        "[::1",
        "user@169.254.1.1",
    ],
)
def test_addresses_of_the_own_link_are_never_read(images, host):
    url = f"http://{host}/latest"
    assert is_link_local(url + "/meta-data") and not is_link_local("s3://169.254.169.254/a")
    with pytest.raises(UserError, match="--allow-root"):
        AllowedPlaces(str(images / "a.csv"), [url])


def _csv_text(rows, delimiter=","):
    return "\n".join([delimiter.join(rows[0]), *(delimiter.join(row.values()) for row in rows)]).encode()


LISTS = {
    "a.csv": [_csv_text(GOOD), b'path,label\n"train/ant/0.png",ant\r\n"train/bee/0.png","be""e"\n', b"path,label"],
    "a.tsv": [_csv_text(GOOD, "\t")],
    "a.jsonl": ["\n".join(json.dumps(row) for row in GOOD).encode(), b'{"path": "train/ant/0.png", "label": 3}\n'],
}


@pytest.mark.parametrize("num", [120, pytest.param(3400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LISTS)
def test_mutated_lists_are_read_or_refused(images, tmp_path, name, num):
    private = folder_of(tmp_path / "private", ["scan.png"])
    tokens = [
        b"../private/scan.png",
        str(private / "scan.png").encode(),
        b"file://",
        b"http://127.0.0.1:1/",
        b"\n",
        b"train/ant",
    ]

    def read(data):
        (images / name).write_bytes(data)
        opened = open_source(CARD, str(images / name))
        list(opened.reader.read(opened.entries))

    counts = fuzz(read, mutants(LISTS[name], num, tokens=tokens), images, private=private)
    assert counts["read"] > num / 50 and counts["refused"] > num / 20


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "classes.txt"])
def test_a_list_that_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_jsonl, "_MAX_BYTES", 1 << 20)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)  # of holes: read, it would be a terabyte of memory
    with pytest.raises(UserError, match=rf"{name} is larger than \d+ MiB"):
        read_classes(str(tmp_path / name)) if name == "classes.txt" else csv_jsonl.open_list(str(tmp_path / name), CARD)


ROWS = [f"{row['path']},{row['label']}" for row in GOOD]


def csv(folder: Path, header: str, ends: list[str]) -> Path:
    rows = (row + end for row, end in zip(ROWS, ends * len(ROWS), strict=False))
    (folder / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "list.csv"


@pytest.mark.parametrize(
    ("header", "ends", "message"),
    [
        ("path,label,is_valid", [",True", ",False"], "a column is_valid that seems to tell splits"),
        ("path,label,fold_idx", [",1", ",2"], "a column fold_idx that seems to tell splits"),
        ("path,label,Test-Set", [",0"], "a column test-set that seems to tell splits"),
        ("path,label,split", [",train", ","], "line 3: split is empty, and [0-9]+ rows have one"),
        ("path,label", [", domestic"], "line 2: more cells than the 2 columns"),
    ],
)
def test_a_list_that_may_tell_splits_or_labels_otherwise_is_refused(images, header, ends, message):
    with pytest.raises(UserError, match=message):
        found(csv(images, header, ends))


def test_columns_that_are_not_read_and_labels_of_two_kinds_are_said(images):
    assert note(csv(images, "path,label,split,is_valid", [",train,0"])).endswith("list were not read (is_valid)")
    for name in ("width", "train_id", "test score", "name"):
        assert f"1 columns of the list were not read ({name})" in note(csv(images, f"path,label,{name}", [",8"]))
    assert "(without a name)" in note(csv(images, "path,label,", [",8"]))
    assert note(csv(images, "path,label", [",", ""])) == ""  # as spreadsheets end their rows
    rows = [{**row, "label": "nan" if not number else number % 2, "split": "train"} for number, row in enumerate(GOOD)]
    floats = [{**row, "label": f"{number % 2}.0", "split": "train"} for number, row in enumerate(GOOD)]
    assert note(jsonl(images, floats)) == "the classes are numbers with a fraction, in the order of text"
    assert note(jsonl(images, rows)) == "2 classes are whole numbers and 1 are not, such as nan"


@pytest.mark.parametrize("name", ["list.json", "list.txt", "list.xlsx"])
def test_a_file_that_is_neither_list_nor_archive_is_refused_as_that(images, name):
    (images / name).write_text("[]")
    with pytest.raises(UserError, match="is no list that is read: write a CSV, TSV or JSONL"):
        found(images / name)
