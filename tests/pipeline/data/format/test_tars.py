"""Walking through tars: whole ones agree with Python's reader, and nothing damaged or hostile passes for whole."""

import hashlib
import io
import tarfile

import pytest

from pipeline.data.format.tars import MAX_HEADER_BYTES, BadTar, HashingStream, read_member, walk


def tar_of(names, *, mode=tarfile.PAX_FORMAT, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=mode) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 1000 + number
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
        for member in extra:
            tar.addfile(member)
    return buffer.getvalue()


def walked(data, stream):
    file = io.BytesIO(data)
    return [
        (m.name, m.offset, read_member(t, i))
        for m, t, i in walk(HashingStream(file) if stream else file, stream=stream)
    ]


NAMES = ["a", "b/" + "x" * 150, "ü/\udcff.jpg", "c"]
WHOLE = tar_of(NAMES)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_and_places_are_those_of_pythons_reader(mode, stream):
    data = tar_of(NAMES, mode=mode)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.offset_data, tar.extractfile(m).read()) for m in tar]
    assert walked(data, stream) == expected
    assert all(data[offset : offset + len(content)] == content for _, offset, content in expected)


def test_the_digest_of_a_stream_is_that_of_every_byte():
    stream = HashingStream(io.BytesIO(WHOLE))
    assert len(list(walk(stream, stream=True))) == 4
    assert stream.sha256.hexdigest() == hashlib.sha256(WHOLE).hexdigest() and stream.num_bytes == len(WHOLE)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tar_cut_anywhere_is_never_whole(stream):
    end = WHOLE.rindex(b"\3" * 1003) + 1024  # up to here there are members; behind it only empty blocks
    for cut in range(0, end + 1, 256):
        with pytest.raises(BadTar):
            walked(WHOLE[:cut], stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_header_does_not_end_a_tar_quietly(stream):
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
        headers = [member.offset_data - 512 for member in tar]
    for header in headers:
        data = bytearray(WHOLE)
        data[header + 3] ^= 1
        with pytest.raises(BadTar):
            walked(bytes(data), stream)
    with pytest.raises(BadTar, match="behind the end mark"):
        walked(WHOLE + WHOLE, stream)


def bomb(kind, size):
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_of_gigabytes_is_refused_unread(kind, stream):
    with pytest.raises(BadTar, match="extended header"):
        walked(bomb(kind, MAX_HEADER_BYTES + 1), stream)
    with pytest.raises(BadTar):
        walked(bomb(kind, 1 << 40), stream)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", ".."])
def test_a_member_outside_is_refused(name):
    with pytest.raises(BadTar, match="outside itself"):
        walked(tar_of(["a", name]), stream=False)


def test_links_devices_and_folders_are_no_files():
    extra = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
        member = tarfile.TarInfo(f"odd{kind!r}")
        member.type, member.linkname = kind, "/etc/passwd"
        extra.append(member)
    assert [name for name, *_ in walked(tar_of(["a"], extra=extra), stream=False)] == ["a"]
