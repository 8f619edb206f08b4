"""Another user of this machine writes nothing of a run, reads nothing secret of it, and gets no answer from its pages."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be another user"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
]
PLANTED = "PL4NTED-5ecret"
IMPORTS = "import encodings.idna, json, os, re, select, sys, urllib.error, urllib.request\n"
NOBODY = IMPORTS + "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"  # who may not reach the library any more
SPY = """
place, planted = sys.argv[1], sys.argv[2].encode()
found = {name: set() for name in ("seen", "readable", "writable", "secret")}
def look():
    for folder, folders, files in os.walk(place):
        for path in [folder, *(os.path.join(folder, name) for name in folders + files)]:
            found["seen"].add(path)
            if os.access(path, os.W_OK) and not os.path.islink(path):
                found["writable"].add(path)
            if os.path.isdir(path) or os.path.islink(path):
                continue
            try:
                with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                    found["readable"].add(path)
                    if planted in file.read(1 << 22):
                        found["secret"].add(path)
            except OSError:
                pass
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    if planted in file.read() and int(pid) != os.getpid():
                        found["secret"].add(f"{name} of a process")
            except OSError:
                pass
print("ready", flush=True)
while True:
    look()
    if select.select([sys.stdin], [], [], 0.1)[0]:
        break
look()
print(json.dumps({name: sorted(paths) for name, paths in found.items()}))
"""
ASK = """
for url in sys.argv[1:]:
    try: print(urllib.request.urlopen(url, timeout=30).status)
    except urllib.error.HTTPError as error: print(error.code)
"""


@pytest.fixture()
def place() -> Iterator[Path]:
    """A folder that everybody may look into, as a home with the usual umask is."""
    folder = Path(tempfile.mkdtemp(prefix="normfree-test-"))
    folder.chmod(0o755)
    try:
        if subprocess.run([sys.executable, "-I", "-c", NOBODY + "os.listdir(sys.argv[1])", folder], cwd="/").returncode:
            pytest.skip("the folder for temporary files is private: no other user comes near it")
        (folder / ".cache").mkdir(mode=0o755)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)
        yield folder
    finally:
        shutil.rmtree(folder)


def environment(place: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "NORMFREE_", "AWS_"))}
    own |= {"HOME": str(place), "TMPDIR": str(place / "tmp"), "AWS_SECRET_ACCESS_KEY": PLANTED}
    return own | {"MLFLOW_TRACKING_TOKEN": PLANTED, "AWS_SESSION_TOKEN": PLANTED}


@contextlib.contextmanager
def watched(place: Path) -> Iterator[dict[str, Any]]:
    """What another user, who looks again and again meanwhile, has seen; filled in at the end."""
    found: dict[str, Any] = {}
    words = [sys.executable, "-I", "-c", NOBODY + SPY, str(place), PLANTED]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as spy:
        assert spy.stdout and spy.stdout.readline() == "ready\n"
        try:
            yield found
        finally:
            found |= json.loads(spy.communicate("\n", timeout=60)[0])


def check(found: dict[str, Any], place: Path) -> None:
    assert found["writable"] == [str(place / "tmp")] and not found["secret"]
    hidden = re.compile(rf"{place}/(\.cache/normfree|tmp)/")
    assert not [path for path in found["readable"] if hidden.match(path)]


def normfree(place: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestration.cli", *words],
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        umask=0o022,
    )


def test_a_run_and_its_pages_give_another_user_nothing(digits: str, place: Path) -> None:
    run = str(place / "run")
    fields = ["--global_batch", "16", "--augment.image_px", "16", "--optim.warmup", "1 steps", "--duration", "2 steps"]
    with watched(place) as found:
        process = normfree(place, "pretrain", "nfnet_tiny_glyphs", "--data.url", digits, "--out", run, *fields)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        code = f"from orchestration.spool.spool import *\nSpool(records_folder('s3://u:{PLANTED}@b/r') / MAIN).close()"
        subprocess.run([sys.executable, "-"], input=code.encode(), env=environment(place), check=True, umask=0o022)
    assert {f"{run}/records.jsonl", f"{place}/.cache/normfree"} <= set(found["seen"])  # it has looked
    assert list((place / ".cache" / "normfree").glob("spools/*/records.jsonl"))
    check(found, place)
    with watched(place) as found:
        pages = normfree(place, "ui", run, "--port", "0")
        try:
            assert pages.stdout
            address = next(match[0] for line in pages.stdout if (match := re.search(r"http://[0-9.:]+", line)))
            urls = [address + path for path in ("/", "/health", "/api/2.0/mlflow/experiments/search?max_results=1")]
            words = [sys.executable, "-I", "-c"]
            theirs = subprocess.run([*words, NOBODY + ASK, *urls], capture_output=True, text=True, cwd="/", check=True)
            ours = subprocess.run([*words, IMPORTS + ASK, urls[0]], capture_output=True, text=True, check=True)
        finally:
            pages.terminate()
            pages.communicate(timeout=60)
    assert theirs.stdout.split() == ["403"] * 3 and ours.stdout.split() == ["200"]
    check(found, place)
