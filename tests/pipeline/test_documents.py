"""Outside documents: bounded, strict, and wrong in one sentence."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import documents
from pipeline.documents import Count, Dimensions, FileName, RelativePath, Sha256
from pipeline.errors import UserError


@dataclass(frozen=True)
class Entry:
    name: FileName
    sha256: Sha256
    size_bytes: Count
    shape: Dimensions = ()
    place: RelativePath = "a/b"
    share: float = 0.5


GOOD = {"name": "a.bin", "sha256": "0f" * 32, "size_bytes": 3}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"a": 1', "cut short"),
        (b'{"a": "x', "damaged|cut short"),
        (b'{"a": 1}}', "damaged|cut short"),
        (b"\xff{}", "not UTF-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "no number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 6000 + b"}", "6000 digits"),
        (b"[" * 100_000, "levels"),
        (b"[" * 65 + b"]" * 65, "levels"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "levels"),
        (b"[" + b" " * (17 << 20) + b"]", "larger than 16 MiB"),
    ],
)
def test_json_that_is_not_plain_is_refused_in_a_sentence(data: bytes, words: str) -> None:
    with pytest.raises(UserError, match=rf"^x/file.json .*({words}).*; restore it, or write it again$"):
        documents.parse_json(data, "x/file.json")


def test_plain_json_is_read() -> None:
    assert documents.parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, "\\ud83d\\ude00", null]}', "f") == {
        "a": [1, 2.5, "😀", None]
    }
    assert documents.parse_json(b"[" * 64 + b"]" * 64, "f")


def test_only_a_line_feed_ends_a_line_of_jsonl() -> None:
    assert list(documents.parse_jsonl('{"a": "x\u2028y"}\n\n[1]\r\n', "f")) == [(1, {"a": "x\u2028y"}), (3, [1])]
    with pytest.raises(UserError, match=r"^f, line 2, is cut short"):
        list(documents.parse_jsonl(b"[1]\n[1", "f"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "/home/you/.bashrc"}, "at sha256: it needs 64 hex digits"),
        ({"sha256": "0f" * 32 + "\n"}, "64 hex digits"),
        ({"sha256": "0F" * 32}, "64 hex digits"),
        ({"sha256": None}, "it needs text and has nothing"),
        ({"name": ".."}, "a plain file name"),
        ({"name": "a/b"}, "a plain file name"),
        ({"name": "a\0b"}, "a plain file name"),
        ({"name": "a\x1b[31m"}, "a plain file name"),
        ({"name": "a\n"}, "a plain file name"),
        ({"name": ""}, "a plain file name"),
        ({"name": "x" * 256}, "length"),
        ({"place": "/etc/passwd"}, "a path below"),
        ({"place": "a/../b"}, "a path below"),
        ({"place": "a//b"}, "a path below"),
        ({"place": "a/"}, "a path below"),
        ({"size_bytes": -1}, "at size_bytes: "),
        ({"size_bytes": True}, "a whole number and has true or false"),
        ({"size_bytes": 3.0}, "a whole number"),
        ({"size_bytes": "3"}, "a whole number and has text"),
        ({"size_bytes": 1 << 60}, "at size_bytes"),
        ({"shape": [1] * 33}, "at shape"),
        ({"shape": [1, -2]}, r"at shape\[1\]|at shape\[\.\.\.\]"),
        ({"share": "0.5"}, "at share: it needs a number and has text"),
    ],
)
def test_values_of_another_type_or_range_are_named_with_their_place(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=rf"^f is not usable: .*({words})"):
        documents.convert({**GOOD, **change}, Entry, "f")


def test_fitting_values_become_a_dataclass_and_missing_ones_are_named(tmp_path: Path) -> None:
    assert documents.convert({**GOOD, "later": 1}, Entry, "f") == Entry("a.bin", "0f" * 32, 3)
    (tmp_path / "f").write_text('{"name": "a.bin"}')
    with pytest.raises(UserError, match=r"it lacks 'sha256'"):
        documents.read(str(tmp_path / "f"), Entry)
    with pytest.raises(UserError, match="no Unicode text"):
        documents.convert({**GOOD, "\ud800": 1}, Entry, "f")
    with pytest.raises(FileNotFoundError):
        documents.read(str(tmp_path / "none"), Entry)


def test_only_regular_files_are_read_and_no_more_than_the_limit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no regular file"):
        documents.read_json("/dev/zero")
    (tmp_path / "f").write_bytes(b" " * 2000)
    with pytest.raises(UserError, match="larger than"):
        documents.read_json(str(tmp_path / "f"), max_bytes=1000)
