"""A cache of blocks that cannot lie, shared by processes, bounded, and never in the way."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.storage import block_cache
from pipeline.storage.block_cache import BlockCache

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "KEEP_FREE_BYTES", 0)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def never() -> bytes:
    raise AssertionError("this was in the cache")


def get(kept: BlockCache, sha256: str, offset: int, length: int, fetch: Callable[[], bytes]) -> bytes:
    with kept.block(sha256, offset, length, fetch) as read:
        return read(offset, offset + length)


def entries(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*-*") if p.is_file()]


def test_equal_places_of_two_shards_never_meet(tmp_path: Path) -> None:
    kept = BlockCache(str(tmp_path), 1 << 20)
    for text in ("train", "value"):
        assert get(kept, sha(text), 0, 5, lambda text=text: text.encode()) == text.encode()
    for text in ("train", "value"):
        assert get(BlockCache(str(tmp_path), 1 << 20), sha(text), 0, 5, never) == text.encode()


@pytest.mark.parametrize("damage", [b"tr", b""])
def test_a_cut_entry_is_fetched_again(damage: bytes, tmp_path: Path) -> None:
    get(BlockCache(str(tmp_path), 1 << 20), sha("a"), 7, 5, lambda: b"train")
    (entry,) = entries(tmp_path)
    entry.write_bytes(damage)
    asked = []
    fresh = BlockCache(str(tmp_path), 1 << 20)
    assert get(fresh, sha("a"), 7, 5, lambda: asked.append(1) or b"train") == b"train" and asked == [1]
    assert get(fresh, sha("a"), 7, 5, never) == b"train"


def test_part_of_an_entry_is_read_and_a_forgotten_one_fetched_again(tmp_path: Path) -> None:
    kept = BlockCache(str(tmp_path), 1 << 20)
    for fetch in (lambda: b"train", never):
        with kept.block(sha("a"), 7, 5, fetch) as read:
            assert (read(8, 10), read(7, 99)) == (b"ra", b"train")
    kept.forget(sha("a"), 7, 5)
    assert get(kept, sha("a"), 7, 5, lambda: b"other") == b"other"


def test_a_full_disk_means_streaming_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "KEEP_FREE_BYTES", 1 << 62)
    kept = BlockCache(str(tmp_path), 1 << 20)
    assert [get(kept, sha("a"), i, 5, lambda: b"train") for i in range(3)] == [b"train"] * 3
    assert kept.failure and "data is streamed past it" in kept.failure and not entries(tmp_path)


def test_a_folder_that_cannot_be_written_means_streaming(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = BlockCache(str(tmp_path / "file" / "cache"), 1 << 20)
    assert get(kept, sha("a"), 0, 5, lambda: b"train") == b"train" and kept.failure


def test_a_fault_of_the_store_is_not_taken_for_one_of_the_cache(tmp_path: Path) -> None:
    kept = BlockCache(str(tmp_path), 1 << 20)
    with pytest.raises(FileNotFoundError):
        get(kept, sha("a"), 0, 5, lambda: (_ for _ in ()).throw(FileNotFoundError("gone")))
    assert kept.failure is None
    assert get(kept, sha("a"), 0, 5, lambda: b"cut") == b"cut" and not entries(tmp_path)  # short: not kept


def test_the_total_stays_in_its_bound_and_what_was_used_last_stays(tmp_path: Path) -> None:
    bound = 1 << 20
    get(BlockCache(str(tmp_path), bound), sha("first"), 0, 10_000, lambda: bytes(10_000))
    for i in range(300):
        get(BlockCache(str(tmp_path), bound), sha("first"), 0, 10_000, never)  # used by a new process each time
        get(BlockCache(str(tmp_path), bound), sha(str(i)), 0, 10_000, lambda: bytes(10_000))
        assert sum(p.stat().st_size for p in entries(tmp_path)) <= bound
    assert len(entries(tmp_path)) > 50


def test_threads_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    asked: list[int] = []
    barrier = threading.Barrier(8)

    def want() -> None:
        barrier.wait()
        get(BlockCache(str(tmp_path), 1 << 20), sha("a"), 0, 5, lambda: asked.append(1) or b"train")

    threads = [threading.Thread(target=want) for _ in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert asked == [1]


def test_processes_that_evict_and_read_at_once_always_get_the_right_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, hashlib, random\nfrom pipeline.storage import block_cache\nblock_cache.KEEP_FREE_BYTES = 0\n"
        "kept = block_cache.BlockCache(sys.argv[1], 200_000)\nchance = random.Random(int(sys.argv[2]))\n"
        "for _ in range(600):\n"
        "    i = chance.randrange(60)\n"
        "    data = hashlib.sha256(str(i).encode()).digest() * 300\n"
        "    with kept.block(hashlib.sha256(str(i).encode()).hexdigest(), 0, len(data), lambda: data) as read:\n"
        "        assert read(0, len(data)) == data\n"
        "assert kept.failure is None, kept.failure\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)], env=environment) for n in range(3)]
    assert [p.wait() for p in running] == [0, 0, 0]
    assert sum(p.stat().st_size for p in entries(tmp_path)) < 3 * 200_000


def test_an_eviction_leaves_what_another_process_is_writing(tmp_path: Path) -> None:
    folder = tmp_path / "ab" / ("ab" * 32)
    folder.mkdir(parents=True)
    fresh, stale = folder / ".1-fresh", folder / ".2-stale"
    for path, age_s in ((fresh, 0), (stale, 7200)):
        path.write_bytes(bytes(50_000))
        os.utime(path, (time.time() - age_s,) * 2)
    kept = BlockCache(str(tmp_path), 60_000)
    for i in range(30):
        get(kept, sha(str(i)), 0, 9_000, lambda: bytes(9_000))
    assert fresh.exists() and not stale.exists() and kept.failure is None
