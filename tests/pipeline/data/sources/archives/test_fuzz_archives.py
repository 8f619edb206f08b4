"""Mutated tars and zips end in images or in a refusal."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pytest

from pipeline.data.sources.open_source import open_source
from tests.fuzzing import fuzz, mutants
from tests.pipeline.data.sources.trees import CARD, TREE, image_bytes


def tar_bytes(form):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in TREE:
            info = tarfile.TarInfo(name if form != tarfile.GNU_FORMAT else f"{'outer/' * 20}{name}")
            info.size = len(image_bytes(name))
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {"comment": "é", "size": str(info.size)}
            tar.addfile(info, io.BytesIO(image_bytes(name)))
        if form != tarfile.GNU_FORMAT:
            for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE)):
                info = tarfile.TarInfo(f"train/ant/{number}link.png")
                info.type, info.linkname = kind, "train/ant/0.png" if number else "0.png"
                tar.addfile(info)
    return buffer.getvalue()


def sparse_tar():
    info = tarfile.TarInfo("train/ant/sparse.bmp")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"%011o\0" % 9000
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512) + tar_bytes(tarfile.PAX_FORMAT)


def zip_bytes(method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name in TREE:
            archive.writestr(name, image_bytes(name))
        info = zipfile.ZipInfo("train/ant/link.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "0.png")
    return buffer.getvalue()


TARS = [tar_bytes(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)] + [sparse_tar()]
ARCHIVES = {
    "tar": TARS,
    "packed": [pack(TARS[0]) for pack in (gzip.compress, bz2.compress, lzma.compress)],
    "zip": [zip_bytes(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)],
}


@pytest.mark.parametrize("num", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_mutated_archives_are_read_or_refused(tmp_path, kind, num):
    place = tmp_path / "in"

    def read(data):
        (place / "archive").write_bytes(data)
        spool = place / "spool"
        for spooled in spool.glob("*"):
            spooled.unlink()
        opened = open_source(CARD, str(place / "archive"), spool=spool)
        list(opened.reader.read(opened.entries))

    tokens = [
        b"PK\x03\x04",
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"PK\x06\x06",
        b"30 size=99999999999999999999\n",
        b"L",
        b"x",
        b"S",
    ]
    seeds = ARCHIVES[kind]
    turned = [seed[::-1] for seed in seeds]  # the directory of a zip is at its end
    both = [*mutants(seeds, num // 2, tokens=tokens), *(data[::-1] for data in mutants(turned, num // 2, seed=1))]
    counts = fuzz(read, both, place)
    assert counts["read"] and counts["refused"] > num / 20


def fixed_checksums(data):
    """A tar whose headers' sums are right, so that what stands in them is looked at."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    return bytes(blocks)


@pytest.mark.parametrize("num", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_tars_with_mutated_headers_are_read_or_refused(tmp_path, num):
    place = tmp_path / "in"

    def read(data):
        (place / "archive").write_bytes(fixed_checksums(data))
        opened = open_source(CARD, str(place / "archive"))
        list(opened.reader.read(opened.entries))

    assert fuzz(read, mutants(TARS, num, seed=2), place)["read"] > num / 50
