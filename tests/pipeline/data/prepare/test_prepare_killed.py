"""Preparing goes on after any kill: equal bytes, and no finished shard is written twice."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare import journal, shard_writer
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from pipeline.storage import objects

ROOT = Path(__file__).parents[4]
CARD = load_card("images")
SHARD_SAMPLES = 7


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(120):
        path = folder / f"train/c{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(path)
    return str(folder)


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    prepare(CARD, str(out), source=source, shard_samples=SHARD_SAMPLES)
    return contents(out)


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def told(decode, write):
    """A byte into the pipe for each picture, so that who kills counts work and not seconds, whatever the load."""
    return lambda data: (os.write(write, b"."), time.sleep(0.003), decode(data))[2]


def finished(out):
    """Inodes of the shards that have a record: a shard that is written again gets another."""
    names = [path.name.removesuffix(".json") for path in (out / journal.FOLDER).glob("*.json")]
    return {name: (out / name).stat().st_ino for name in names}


def test_twenty_kills_at_random_moments_change_nothing_and_rewrite_nothing(source, unbroken, tmp_path):
    out, rng, kept = tmp_path / "out", random.Random(0), {}
    num_growing = 0
    for _ in range(20):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            shard_writer.decode_image = told(shard_writer.decode_image, write)
            prepare(CARD, str(out), source=source, shard_samples=SHARD_SAMPLES)
            os._exit(0)
        os.close(write)
        for _ in range(rng.randint(0, 2 * SHARD_SAMPLES)):
            os.read(read, 1)  # empty at once where it has ended
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        if (out / "manifest.json").exists():
            break
        now = finished(out)
        assert {name: now.get(name) for name in kept} == kept  # what was finished is there, and is the same file
        num_growing += len(now) > len(kept)
        kept = now
    assert num_growing > 2
    shards = {name: (out / name).stat().st_ino for name in kept}
    prepare(CARD, str(out), source=source, shard_samples=SHARD_SAMPLES)
    assert shards == kept and contents(out) == unbroken


def test_workers_end_with_a_killed_parent_and_their_number_changes_no_byte(source, unbroken, tmp_path):
    out = tmp_path / "out"
    words = ["data", "prepare", "images", "--source", source, "--out", str(out), "--shard-samples", str(SHARD_SAMPLES)]
    command = [sys.executable, "-m", "orchestration.cli", *words, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(finished(out)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()  # the parent alone
    process.wait()
    while time.monotonic() < deadline and session(process.pid):
        time.sleep(0.05)
    assert not session(process.pid)
    kept = finished(out)
    again = subprocess.run(
        command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    assert again.returncode == 0 and contents(out) == unbroken
    assert kept and {name: (out / name).stat().st_ino for name in kept} == kept


def session(sid):
    """Processes of a session that are still there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == sid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(source, unbroken, tmp_path, monkeypatch):
    out = tmp_path / "out"
    publish, calls = shard_writer.publish, []

    def full(path, url):
        calls.append(url)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(path, url)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "publish", full)
        with pytest.raises(UserError, match=r"no space left for .*finished shards are kept"):
            prepare(CARD, str(out), source=source, shard_samples=SHARD_SAMPLES)
    kept = finished(out)
    assert len(kept) == 5
    with pytest.raises(UserError, match="is not finished"):
        Manifest.open(str(out))
    prepare(CARD, str(out), source=source, shard_samples=SHARD_SAMPLES)
    assert contents(out) == unbroken and {name: (out / name).stat().st_ino for name in kept} == kept


def test_a_damaged_record_or_a_shard_that_is_gone_is_written_again(source, unbroken, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupted(_):  # not by a signal: where tests run in the background, SIGINT is ignored
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "perceptual_hash", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(CARD, str(out), source=source, shard_samples=SHARD_SAMPLES)
    pid = os.fork()
    if pid == 0:
        done = []
        prepare(
            CARD,
            str(out),
            source=source,
            shard_samples=SHARD_SAMPLES,
            progress=lambda *call: os._exit(9) if len(done) > 8 else done.append(call),
        )
    os.waitpid(pid, 0)
    names = sorted(finished(out))
    (out / names[0]).unlink()
    (out / journal.FOLDER / f"{names[1]}.json").write_bytes(b'{"plan": ')
    prepare(CARD, str(out), source=source, shard_samples=SHARD_SAMPLES)
    assert contents(out) == unbroken


def test_what_a_writer_killed_in_the_last_moment_left_is_cleared(source, unbroken, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    dead, alive = (out / f"{objects.TEMP_PREFIX}{p}-abc" for p in (pid, os.getpid()))
    prepare(
        CARD, str(out), source=source, shard_samples=SHARD_SAMPLES, progress=lambda *_: (dead.touch(), alive.touch())
    )
    assert not dead.exists() and alive.exists()
