"""Places: the disk or bucket of a run, the dataset, the tracker. What is written is small, ours by a random name, and removed."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from orchestration.doctor.messages import Examined, Finding, words
from pipeline import places
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage import objects

T = TypeVar("T")
SAMPLE_BYTES, SAMPLE_S = 32 << 20, 2.0
OBJECT_BYTES = 4 << 20
FREE_BYTES = {"temporary folder": 512 << 20, "caches": 2 << 30, "--out": 5 << 30}
"""Sockets and what is needed for a moment; indices and fetched checkpoints; checkpoints."""
SLOW_BYTES_S = 20e6
"""Of a place for checkpoints and shards: a host decodes more than this in images."""
SEEN_S = 15.0
"""A network disk may take this long to show a host what another one wrote."""
PROBE = ".normfree-doctor-"


def disk(folder: Path, what: str) -> Examined:
    """Space and speed of the disk below `folder`, which need not be there yet."""
    there = existing(folder)
    usage = shutil.disk_usage(there)
    facts = {what: f"{folder}: {usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB"}
    findings = []
    if usage.free < FREE_BYTES[what]:
        findings.append(
            Finding(what=what, value=f"{usage.free / 1e9:.2f} GB free at {there}", remedy="make room there")
        )
    if usage.free > 4 * SAMPLE_BYTES:
        try:
            written, read = _disk_speed(there)
        except OSError as error:
            value, remedy = f"{there} cannot be written ({error.strerror})", "give a folder that this user can write"
            return Examined(facts=facts, findings=[*findings, Finding(what=what, value=value, remedy=remedy)])
        facts[what] += f"; writes {written / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s"
        if min(written, read) < SLOW_BYTES_S:
            findings.append(
                Finding(what=f"{what} speed", value=facts[what], remedy="use a faster disk", is_fault=False)
            )
    return Examined(facts=facts, findings=findings)


def existing(folder: Path) -> Path:
    """It, or the nearest folder above that is there."""
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.is_dir())


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes a second: written and kept, read again from the disk where the kernel lets go of what it has in memory."""
    with places.temporary_folder("doctor", folder) as own:
        data, size, begin_s = os.urandom(1 << 20), 0, time.perf_counter()
        with open(own / "sample", "wb") as file:
            # Kept piece by piece: how long the disk takes for all that the kernel holds for it, nobody could interrupt.
            while size < SAMPLE_BYTES and time.perf_counter() - begin_s < SAMPLE_S:
                size += file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written_s = time.perf_counter() - begin_s
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin_s = time.perf_counter()
        with open(own / "sample", "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        return size / written_s, size / (time.perf_counter() - begin_s)


def bucket(url: str) -> Examined:
    """Rights and speed below `url` in an object store: an object of ours is written, listed, read and deleted."""
    mark = objects.join(url, f"{PROBE}{os.urandom(8).hex()}")
    name, data = objects.join(mark, "object"), os.urandom(OBJECT_BYTES)
    spent: dict[str, float] = {}
    what = f"--out {public(url)}"
    try:
        _timed(spent, "write", lambda: objects.write_bytes(name, data))
        if name not in _timed(spent, "list", lambda: objects.list_urls(mark)):
            raise UserError(
                f"the store does not list {name}, which it has just taken; use a store that lists what it holds"
            )
        if _timed(spent, "read", lambda: objects.read_bytes(name)) != data:
            raise UserError(f"{name} does not come back as it was written; look at the store and what lies before it")
    except Exception as error:  # clients of stores raise what they like
        done = f" (it could {', '.join(spent)})" if spent else ""
        fault = Finding(what="--out", value=f"{words(error)}{done}", remedy="give the credentials these rights there")
        return Examined(facts={what: "not usable"}, findings=[fault, *_remove(name)])
    findings = _remove(name, spent)
    rates = [f"{doing}s {OBJECT_BYTES / spent[doing] / 1e6:.0f} MB/s" for doing in ("write", "read")]
    facts = {what: f"{', '.join(rates)}, lists in {spent['list']:.2f} s, deletes in {spent.get('delete', 0):.2f} s"}
    slowest = OBJECT_BYTES / max(spent["write"], spent["read"])
    if slowest < SLOW_BYTES_S / 4:
        findings.append(
            Finding(what="--out speed", value=facts[what], remedy="use a store in the same network", is_fault=False)
        )
    return Examined(facts=facts, findings=findings)


def _remove(name: str, spent: dict[str, float] | None = None) -> list[Finding]:
    try:
        _timed({} if spent is None else spent, "delete", lambda: objects.remove(name))
    except Exception as error:
        return [
            Finding(
                what="--out",
                value=f"{public(name)} cannot be deleted ({words(error)})",
                remedy="allow it: old checkpoints are deleted; and delete that object",
            )
        ]
    return []


def dataset(url: str) -> Examined:
    """The manifest verifies, and a shard is read for a moment."""
    from pipeline.data.format.manifest import Manifest

    what, spent = f"--data {public(url)}", dict[str, float]()
    try:
        manifest = _timed(spent, "manifest", lambda: Manifest.open(url))
        shard = manifest.split(next(iter(manifest.splits))).shards[0]
        size = min(shard.size_bytes, SAMPLE_BYTES)
        _timed(spent, "shard", lambda: objects.read_range(objects.join(url, shard.name), 0, size))
    except Exception as error:
        fault = Finding(what="--data", value=words(error), remedy="prepare or restore it, or give the place of one")
        return Examined(facts={what: "not usable"}, findings=[fault])
    rate = size / spent["shard"]
    text = (
        f"{manifest.name}, {sum(s.num_samples for s in manifest.splits.values()):,} images; reads {rate / 1e6:.0f} MB/s"
    )
    findings = []
    if rate < SLOW_BYTES_S and size > OBJECT_BYTES:
        remedy = "set --data.cache_dir to a local disk, or copy the shards"
        findings.append(Finding(what="--data speed", value=text, remedy=remedy, is_fault=False))
    return Examined(facts={what: text, "data": manifest.digest[:16]}, findings=findings)


def tracker(uri: str) -> Examined:
    """MLflow answers, with its version. Nothing is made there."""
    from orchestration.serve.import_records import refuse_dead_server
    from orchestration.tracking.mlflow_client import server_version

    what, spent = f"tracker {public(uri)}", dict[str, float]()
    try:
        _timed(spent, "ask", lambda: refuse_dead_server(uri))
        version = server_version(uri)
    except Exception as error:
        return Examined(
            facts={what: "not usable"},
            findings=[Finding(what="tracker", value=words(error), remedy="start it, or mend address and credentials")],
        )
    return Examined(facts={what: f"{version}, answers in {spent['ask']:.2f} s"})


class SharedPlace:
    """Whether hosts see one another's files under one `--out`: each writes a mark and looks for those of all."""

    def __init__(self, url: str, token: str) -> None:
        self._folder = objects.join(_nearest(url), f"{PROBE}{places.entry_name(token, 'the doctor')}")

    def write(self, name: str) -> None:
        objects.write_bytes(objects.join(self._folder, places.entry_name(name, "the doctor")), b"here\n")

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those whose marks are not seen here, after a while."""
        deadline_s = time.monotonic() + SEEN_S
        while True:
            found = {url.rsplit("/", 1)[-1] for url in objects.list_urls(self._folder)}
            absent = [name for name in names if name not in found]
            if not absent or time.monotonic() > deadline_s:
                return absent
            time.sleep(0.5)

    def remove(self, name: str) -> None:
        objects.remove(objects.join(self._folder, places.entry_name(name, "the doctor")))
        if objects.is_local(self._folder):
            with contextlib.suppress(OSError):  # another host's mark is there still; that one removes it
                objects.local_path(self._folder).rmdir()


def _nearest(url: str) -> str:
    return str(existing(objects.local_path(url))) if objects.is_local(url) else url


def _timed(spent: dict[str, float], what: str, work: Callable[[], T]) -> T:
    begin_s = time.perf_counter()
    found = work()
    spent[what] = max(time.perf_counter() - begin_s, 1e-9)
    return found
