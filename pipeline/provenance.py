"""Where a run comes from: the revision of the code, whether it was changed, and the versions that it ran with."""

import functools
import hashlib
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
ROOT = Path(__file__).resolve().parents[1]
COMMAND = "NORMFREE_COMMAND"
"""The variable by which a launcher tells its ranks what was typed."""


def facts(root: Path | None = None) -> dict[str, str]:
    """What an attempt says of itself: `code.*`, `environment.*`. `root`: of the code, by default of this package.

    Code that was installed from a package has no revision; its version stands among the libraries.
    """
    # Tag, commits since and hash, or just the hash; with -dirty where tracked files are changed.
    revision = _git(root or ROOT, "describe", "--always", "--dirty", "--tags", "--abbrev=12", limit_s=5) or None
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
    whole = hashlib.sha256()
    for path in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        whole.update(f"{path.relative_to(ROOT)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
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


def _git(root: Path, *words: str, limit_s: float) -> str | None:
    """What git says of the checkout `root`; None where there is none, or git does not answer."""
    if not (root / ".git").exists():  # a package inside somebody else's repository is no revision of ours
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=limit_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def code_revision() -> str:
    """Git's commit of the checkout, with + where files differ from it; the package's version where there is no checkout."""
    head = _git(ROOT, "rev-parse", "HEAD", limit_s=20)
    changed = _git(ROOT, "status", "--porcelain", "--untracked-files=no", limit_s=20)
    if head is not None and changed is not None:
        return head + ("+" if changed else "")
    version = _version("normfree")
    return "unknown" if version is None else f"version {version}"
