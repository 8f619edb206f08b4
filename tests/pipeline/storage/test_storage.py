"""Storage: objects appear whole or not at all, locally and on an fsspec store."""

import hashlib
import os
import uuid

import pytest

from pipeline.storage import clients, content_cache, listing, objects


@pytest.fixture(params=["path", "file", "memory"])
def root(request, tmp_path):
    return {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


@pytest.fixture
def remote():
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(clients, "FIRST_WAIT_S", 0.0)


def test_round_trip(root, tmp_path):
    url = objects.join(root, "a", "b.bin")
    assert not objects.exists(url)
    objects.write_bytes(url, b"0123456789")
    assert objects.exists(url) and objects.size_bytes(url) == 10
    assert objects.read_bytes(url) == b"0123456789"
    assert objects.read_range(url, 3, 4) == b"3456" and objects.read_range(url, 3, 0) == b""
    objects.write_bytes(url, b"new")
    assert objects.read_bytes(url) == b"new"
    local = tmp_path / "local"
    local.write_bytes(b"x" * 1000)
    objects.put_file(local, objects.join(root, "c"))
    objects.download(objects.join(root, "c"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    with objects.open_read(url) as file:
        file.seek(1)
        assert file.read() == b"ew"


def test_listing_is_sorted_recursive_and_fresh(root):
    for name in ("b.tar", "a/x.tar", "a/y.txt"):
        objects.write_bytes(objects.join(root, "d", name), b"1")
    names = [url.rpartition("/d/")[2] for url in objects.list_urls(objects.join(root, "d"))]
    assert names == ["a/x.tar", "a/y.txt", "b.tar"]
    assert [objects.read_bytes(url) for url in objects.list_urls(objects.join(root, "d"), ".tar")] == [b"1", b"1"]
    sizes = listing.sizes(objects.join(root, "d"), (".tar",))
    assert sizes == dict.fromkeys(objects.list_urls(objects.join(root, "d"), ".tar"), 1)
    objects.write_bytes(objects.join(root, "d", "c.tar"), b"1")
    assert len(objects.list_urls(objects.join(root, "d"))) == 4
    objects.remove(objects.join(root, "d", "c.tar"))
    objects.remove(objects.join(root, "d", "c.tar"))
    assert len(objects.list_urls(objects.join(root, "d"))) == 3
    objects.remove_tree(objects.join(root, "d"))
    objects.remove_tree(objects.join(root, "d"))
    assert objects.list_urls(objects.join(root, "d")) == []


def test_missing_and_short(root, no_waiting):
    with pytest.raises(FileNotFoundError):
        objects.read_bytes(objects.join(root, "none"))
    with pytest.raises(FileNotFoundError):
        objects.size_bytes(objects.join(root, "none"))
    objects.write_bytes(objects.join(root, "ten"), b"0123456789")
    with pytest.raises(OSError, match="offset 8"):
        objects.read_range(objects.join(root, "ten"), 8, 4)


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("a/b/", ("c",), "a/b/c"),
        ("/", ("c",), "/c"),
        ("s3://bucket", ("x/", "/y"), "s3://bucket/x/y"),
        ("memory://", ("a",), "memory://a"),
        ("file:///d", (), "file:///d"),
    ],
)
def test_join(url, parts, joined):
    assert objects.join(url, *parts) == joined


def test_local_path():
    assert (
        str(objects.local_path("file:///a/b")) == "/a/b" and objects.is_local("a/b") and not objects.is_local("s3://a")
    )
    with pytest.raises(ValueError, match="s3://a"):
        objects.local_path("s3://a")


def test_interrupted_local_write_leaves_the_old_object(tmp_path, monkeypatch):
    target = tmp_path / "x"
    objects.write_bytes(target, b"old")
    monkeypatch.setattr(objects.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        objects.write_bytes(target, b"new and longer")
    assert target.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_fetch_is_keyed_by_content_and_mends_itself(remote, tmp_path):
    contents = {"a/0.tar": b"train", "b/0.tar": b"value"}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}

    def fetch(name):
        return content_cache.fetch(objects.join(remote, name), sha256=digests[name], size_bytes=5, cache_dir=tmp_path)

    for name, data in contents.items():
        objects.write_bytes(objects.join(remote, name), data)
    paths = {name: fetch(name) for name in contents}
    assert {name: path.read_bytes() for name, path in paths.items()} == contents
    paths["a/0.tar"].write_bytes(b"wrong")
    assert fetch("a/0.tar").read_bytes() == b"train"
    objects.write_bytes(objects.join(remote, "a/0.tar"), b"other")
    assert fetch("a/0.tar").read_bytes() == b"train"  # known content needs no store
    with pytest.raises(OSError, match="does not hold"):
        content_cache.fetch(objects.join(remote, "a/0.tar"), sha256="0" * 64, size_bytes=5, cache_dir=tmp_path)
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 2


def test_fetch_of_a_local_file_is_the_file(tmp_path):
    assert content_cache.fetch(str(tmp_path / "x"), sha256="0" * 64, size_bytes=0, cache_dir=tmp_path) == tmp_path / "x"


@pytest.mark.parametrize("digest", ["{victim}", "../victim", "", "0" * 63, "0" * 64 + "\n", "A" * 64])
def test_a_digest_that_is_a_path_is_no_cache_entry(remote, tmp_path, digest):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    objects.write_bytes(objects.join(remote, "x"), b"theirs")
    with pytest.raises(ValueError, match="not 64 hex digits"):
        content_cache.fetch(
            objects.join(remote, "x"), sha256=digest.format(victim=victim), size_bytes=6, cache_dir=tmp_path / "cache"
        )
    assert victim.read_bytes() == b"mine"


def test_the_start_of_an_object_is_read_without_the_rest(remote):
    objects.write_bytes(objects.join(remote, "x"), b"0123456789")
    objects.write_bytes(objects.join(remote, "empty"), b"")
    assert objects.read_bytes(objects.join(remote, "x"), max_bytes=4) == b"0123"
    assert objects.read_bytes(objects.join(remote, "x"), max_bytes=40) == b"0123456789"
    assert objects.read_bytes(objects.join(remote, "empty"), max_bytes=4) == b""
    with pytest.raises(FileNotFoundError):
        objects.read_bytes(objects.join(remote, "none"), max_bytes=4)


def test_transient_errors_are_tried_again_and_others_are_not(remote, monkeypatch, no_waiting):
    from fsspec.implementations.memory import MemoryFileSystem

    objects.write_bytes(objects.join(remote, "x"), b"1")
    calls = []
    original = MemoryFileSystem.cat_file

    def flaky(self, path, **kwargs):
        calls.append(path)
        if len(calls) < clients.MAX_TRIES:
            raise ConnectionResetError("reset")
        return original(self, path, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    assert objects.read_bytes(objects.join(remote, "x")) == b"1" and len(calls) == clients.MAX_TRIES
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **_: calls.append(path) or _raise())
    calls.clear()
    with pytest.raises(objects.UserError, match="credentials"):
        objects.read_bytes(objects.join(remote, "x"))
    assert len(calls) == 1


def _raise():
    raise PermissionError("no")


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(objects.UserError, match="is no regular file"):
            objects.read_bytes(place)


def test_a_short_remote_write_is_noticed(remote, tmp_path, monkeypatch, no_waiting):
    from fsspec.implementations.memory import MemoryFileSystem

    original = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, **kw: original(self, path, value[:2], **kw)
    )
    with pytest.raises(OSError, match="holds 2 bytes of the 5"):
        objects.write_bytes(objects.join(remote, "x"), b"12345")


def test_unknown_protocol_is_the_users_error():
    with pytest.raises(objects.UserError, match="nonsense"):
        objects.exists("nonsense://a/b")
