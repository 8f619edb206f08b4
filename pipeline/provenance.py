"""Where a run comes from: the revision of the code, whether it was changed, and the versions that it ran with."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pipeline.display import shell
from pipeline.secrets import public
from pipeline.supervision.rank_environment import TORCHRUN

LIBRARIES = ("normfree", "torch", "deepspeed", "ray", "mlflow", "webdataset", "safetensors", "numpy")
DECIDE = ("torch", "deepspeed", "numpy", "pillow", "turbojpeg")
"""Libraries whose versions decide numbers: of the network, its update, the order of the data, pixels."""
PACKAGES = ("nfnet", "pipeline", "transfer", "orchestration")
GIT_S = 5.0
COMMAND = "NORMFREE_COMMAND"
"""The variable by which a launcher tells its ranks what was typed."""


def facts(root: Path | None = None) -> dict[str, str]:
    """What an attempt says of itself: `code.*`, `environment.*`. `root`: of the code, by default of this package.

    Code that was installed from a package has no revision; its version stands among the libraries.
    """
    revision = _git(root or Path(__file__).resolve().parents[1])
    found = {
        "code.revision": revision.removesuffix("-dirty") if revision else None,
        "code.dirty": None if revision is None else str(revision.endswith("-dirty")).lower(),
        "environment.python": platform.python_version(),
        "environment.platform": platform.platform(),
        "environment.libraries": libraries(),
        "environment.command": command(),
        "environment.folder": os.getcwd(),
    }
    return {name: text for name, text in found.items() if text is not None}


@functools.cache
def libraries() -> str:
    """Names and versions of those that decide numbers."""
    return ", ".join(f"{name} {version}" for name in LIBRARIES if (version := _version(name)))


def deciding_versions() -> dict[str, str]:
    """Of Python and of the libraries that decide numbers; "none" for one that is not installed."""
    major, minor, _ = platform.python_version_tuple()
    return {"python": f"{major}.{minor}", **{name: _version(name) or "none" for name in DECIDE}}


@functools.cache
def code_digest() -> str:
    """SHA-256 over the Python files of our packages as they lie on this machine: committed or not, a checkout or installed."""
    root, whole = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        whole.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def command() -> str:
    """What was typed, without secrets: typed again in the same folder, it does the same again."""
    return os.environ.get(COMMAND) or public(shell(_as_typed(_torchrun() or sys.orig_argv)))


def _torchrun() -> list[str]:
    """The words of torch's launcher on this machine, where it started this process; none otherwise."""
    if TORCHRUN not in os.environ:
        return []
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    except OSError:
        return []


def _as_typed(words: list[str]) -> list[str]:
    """The name of a program on PATH for the interpreter and the script that the system made of it."""
    name = Path(words[1]).name if len(words) > 1 else ""
    if name not in ("normfree", "torchrun"):
        return words
    found = shutil.which(name)
    is_found = found is not None and os.path.realpath(found) == os.path.realpath(words[1])
    return [name if is_found else words[1], *words[2:]]


def _git(root: Path) -> str | None:
    """Tag, commits since and hash, or just the hash; with -dirty where tracked files are changed."""
    if not (root / ".git").exists():  # a package inside somebody else's repository is no revision of ours
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def code_revision() -> str:
    """Git's commit of the checkout, with + where files differ from it; the package's version where there is no checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        if not (root / ".git").exists():
            raise OSError
        found = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        return found[0].strip() + ("+" if found[1].strip() else "")
    except (OSError, subprocess.SubprocessError):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return "version " + importlib.metadata.version("normfree")
        return "unknown"
