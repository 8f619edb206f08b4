"""The drill's object store answers the clients that runs use, as S3 does, and fails when it is told to."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.operations.drill.store import Store
from pipeline.errors import UserError
from pipeline.storage import clients, conditional_put, multipart_upload, objects


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import s3fs

    with Store(tmp_path / "store") as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # the address is none of a client's arguments
        yield running
        s3fs.S3FileSystem.clear_instance_cache()


def test_objects_are_written_read_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    url = "s3://drill/run/a b.txt"
    assert not objects.exists(url)
    objects.write_bytes(url, b"hello")
    assert (objects.read_bytes(url), objects.read_range(url, 1, 3), objects.size_bytes(url)) == (b"hello", b"ell", 5)
    assert (store.folder / "drill/run/a b.txt").read_bytes() == b"hello"
    large = os.urandom(multipart_upload.PART_BYTES + 5)
    objects.put_memory("s3://drill/run/large", memoryview(large), lambda: None)
    assert objects.read_bytes("s3://drill/run/large") == large and store.uploads == {}
    objects.write_bytes("s3://drill/empty", b"")
    assert objects.read_bytes("s3://drill/empty", max_bytes=9) == b""
    assert objects.list_urls("s3://drill/run") == [url, "s3://drill/run/large"]
    objects.remove_tree("s3://drill/run")
    assert objects.list_urls("s3://drill") == ["s3://drill/empty"]


def test_one_of_two_writers_wins(store: Store) -> None:
    url = "s3://drill/owner.json"
    assert conditional_put.replace(url, b"1", None) and not conditional_put.replace(url, b"2", None)
    before = conditional_put.read(url)
    assert conditional_put.replace(url, b"3", before) and not conditional_put.replace(url, b"4", before)
    assert objects.read_bytes(url) == b"3"


def test_it_fails_and_comes_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_TRIES", 1)
    objects.write_bytes("s3://drill/a", b"1")
    store.is_failing = True
    with pytest.raises(OSError, match="Internal"):
        objects.read_bytes("s3://drill/a")
    store.is_failing = False
    assert objects.read_bytes("s3://drill/a") == b"1"


def test_nobody_without_its_key_is_answered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    objects.write_bytes("s3://drill/a", b"1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match="AccessDenied"):
        objects.read_bytes("s3://drill/a")
