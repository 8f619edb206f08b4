"""Folders, tars and zips: links and sparse members are read, what cannot be is counted, what lies is refused."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile

import pytest

from pipeline.data.sources.entry import Unreadable
from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from tests.pipeline.data.sources.trees import CARD, TREE, folder_of, found, image_bytes, note


def member(name, kind=tarfile.REGTYPE, target="", **headers):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, target, headers
    return info


def tar_of(path, names=TREE, extra=()):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes(name))
            tar.addfile(info, io.BytesIO(image_bytes(name)))
        for info in extra:
            tar.addfile(info)
    return path


def test_links_in_a_tar_are_read_inside_it_and_counted_else(tmp_path):
    extra = [
        member("train/ant/hard.png", tarfile.LNKTYPE, "train/ant/0.png"),
        member("train/ant/soft.png", tarfile.SYMTYPE, "../bee/1.png"),
        member("train/ant/twice.png", tarfile.SYMTYPE, "soft.png"),
        member("test", tarfile.SYMTYPE, "val"),
        member("train/ant/broken.png", tarfile.SYMTYPE, "none.png"),
        member("train/ant/out.png", tarfile.SYMTYPE, "/etc/passwd"),
        member("train/ant/up.png", tarfile.LNKTYPE, "../../etc/passwd"),
        member("train/ant/a.png", tarfile.SYMTYPE, "b.png"),
        member("train/ant/b.png", tarfile.SYMTYPE, "a.png"),
        member("train/ant/again", tarfile.SYMTYPE, ".."),
        member("train/ant/pipe.png", tarfile.FIFOTYPE),
    ]
    source = tar_of(tmp_path / "a.tar", extra=extra)
    linked = [f"train/ant/{name}.png" for name in ("hard", "soft", "twice")]
    linked += [name.replace("val", "test") for name in TREE if name.startswith("val")]
    assert found(source) == sorted([*TREE, *linked])
    assert "6 links that lead nowhere or out of the archive, 1 devices, pipes" in note(source)


def test_links_that_multiply_are_refused(tmp_path):
    names = [f"train/ant/{number}.png" for number in range(300)] + ["train/bee/1.png"]
    extra = [member(f"train/c{number}", tarfile.SYMTYPE, "ant") for number in range(20)]
    with pytest.raises(UserError, match="links that make more than"):
        found(tar_of(tmp_path / "a.tar", names, extra))


def test_a_sparse_member_of_a_tar_is_read(tmp_path):
    data = image_bytes("x", "BMP") + bytes(8192)
    info = member("train/ant/s.bmp", tarfile.GNUTYPE_SPARSE)
    info.size = 512
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"%011o\0" % len(data)
    block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)
    whole = tar_of(tmp_path / "a.tar").read_bytes()
    end = whole.rindex(image_bytes(TREE[-1])) // 512 * 512 + 512
    (tmp_path / "a.tar").write_bytes(whole[:end] + block + data[:512] + bytes(1024))
    opened = open_source(CARD, str(tmp_path / "a.tar"))
    [entry] = [entry for entry in opened.entries if entry.key == "s"]
    assert list(opened.reader.read([entry])) == [data]
    block[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 1 << 29)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "a.tar").write_bytes(whole[:end] + block + data[:512] + bytes(1024))
    with pytest.raises(UserError, match=r"the map of the sparse member|cut short"):
        found(tmp_path / "a.tar")


def test_links_in_a_folder_are_followed_without_circles(tmp_path):
    source, elsewhere = folder_of(tmp_path / "a", TREE), folder_of(tmp_path / "b", ["1.png", "cow/2.png"])
    for link, target in {
        "test": "val",
        "train/ant/out.png": elsewhere / "1.png",
        "train/cow": elsewhere / "cow",
        "train/ant/circle": "..",
        "train/ant/broken.png": "none.png",
        "train/ant/self.png": "self.png",
    }.items():
        (source / link).symlink_to(target)
    os.mkfifo(source / "train/ant/pipe.png")
    more = ["train/ant/out.png", "train/cow/2.png", *(name.replace("val", "test") for name in TREE if "val" in name)]
    assert found(source) == sorted([*TREE, *more])
    assert "2 links that lead out of the source were followed" in note(source)
    assert "3 links that lead nowhere" in note(source) and "1 devices, pipes" in note(source)


def test_a_class_of_broken_links_is_no_class_fewer(tmp_path):
    source = folder_of(tmp_path / "a", TREE)
    (source / "train" / "cow").mkdir()
    (source / "train" / "cow" / "1.png").symlink_to("gone.png")
    tar = tar_of(tmp_path / "a.tar", extra=[member("train/cow/1.png", tarfile.SYMTYPE, "gone.png")])
    for where in (source, tar):
        with pytest.raises(UserError, match=r"empty folder \(train/cow\).*1 links that lead nowhere"):
            found(where)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read all")
def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    source = folder_of(tmp_path / "a", TREE)
    (source / "train" / "bee").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        found(source)


def zip_of(path, names=TREE, change=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, image_bytes(name))
    data = bytearray(path.read_bytes())
    if change:
        change(data, data.rindex(b"PK\1\2"))
    path.write_bytes(data)
    return path


def test_names_without_the_mark_of_utf8_are_read_as_utf8_and_that_is_said(tmp_path):
    names = [*TREE, "train/étés/1.png"]

    def unmark(data, at):
        for start in (at, data.rindex(b"PK\3\4")):
            where = start + (8 if data[start + 2] == 1 else 6)
            data[where + 1] &= ~8

    source = zip_of(tmp_path / "a.zip", names, unmark)
    assert found(source) == sorted(names) and "1 names in the zip are not marked as UTF-8" in note(source)

    def code_page(data, at):
        unmark(data, at)
        data[:] = data.replace("étés".encode(), b"\x82t\x82sss")

    source = zip_of(tmp_path / "b.zip", names, code_page)
    assert "train/étésss/1.png" in found(source) and "1 names in the zip are not UTF-8" in note(source)


def test_links_in_a_zip(tmp_path):
    path = zip_of(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        for name, target in (("train/ant/soft.png", "../bee/1.png"), ("train/ant/out.png", "/etc/passwd")):
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, target)
    assert found(path) == sorted([*TREE, "train/ant/soft.png"]) and "1 links that lead nowhere" in note(path)


@pytest.mark.parametrize(("place", "size"), [(20, 4), (42, 4)])
@pytest.mark.parametrize("number", [0x7FFFFFF0, 0xFFFFFFF0])
def test_a_zip_that_lies_about_places_is_refused(tmp_path, place, size, number):
    def lie(data, at):
        data[at + place : at + place + size] = struct.pack("<I", number)

    with pytest.raises(UserError, match="would end behind the file"):
        found(zip_of(tmp_path / "a.zip", change=lie))


@pytest.mark.parametrize("number", [5, 0xFFFFFFFE])
def test_a_zip_member_that_lies_about_its_size_is_an_image_less(tmp_path, number):
    def lie(data, at):
        data[at + 24 : at + 28] = struct.pack("<I", number)

    opened = open_source(CARD, str(zip_of(tmp_path / "a.zip", change=lie)))
    assert [isinstance(data, Unreadable) for data in opened.reader.read(opened.entries)].count(True) == 1


def test_members_that_lie_on_each_other_are_refused(tmp_path):
    def overlap(data, at):
        data[at + 42 : at + 46] = bytes(4)

    with pytest.raises(UserError, match="on each other"):
        found(zip_of(tmp_path / "a.zip", change=overlap))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_of_several_streams_is_read_and_a_bomb_is_not(tmp_path, pack):
    plain = tar_of(tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar.x").write_bytes(pack(plain[:3000]) + pack(plain[3000:]))
    assert found(tmp_path / "b.tar.x") == TREE
    (tmp_path / "c.tar.x").write_bytes(pack(plain) + pack(bytes(70 << 20)))
    with pytest.raises(UserError, match="unpacks to more than"):
        found(tmp_path / "c.tar.x")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
        (b"Rar!\x1a\x07", "a RAR archive"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"version https://git-lfs", "a pointer of Git LFS"),
        (image_bytes("x"), "one image"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, start, what):
    (tmp_path / "a.tar").write_bytes(start + bytes(2000))
    with pytest.raises(UserError, match=f"a.tar is {what}.*, which is not read"):
        found(tmp_path / "a.tar")


@pytest.mark.parametrize("size", ["-5", str(1 << 62)])
def test_a_tar_that_lies_about_sizes_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=r"a\.tar is (damaged|no readable tar)"):
        found(tar_of(tmp_path / "a.tar", extra=[member("train/ant/l.png", size=size)]))
