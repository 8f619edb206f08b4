"""From names that others wrote to paths, and folders that nobody else can enter: the one door to places on this machine.

A name out of a bucket, a dataset, an archive, a manifest or a URL becomes a path only through `entry_name` or `below`. What may
stand in a folder that others write to is opened by `open_below`, which follows no link on the way. Records, caches and
sockets that are nobody else's business lie in a `private_folder`; what is needed for a while, in a `temporary_folder`, which is
private too, has a random name, and outlives its process by no more than the next start.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.display import terminal
from pipeline.errors import UserError

MAX_NAME_BYTES = 255
TEMPORARY = "normfree-tmp-"
MAX_SOCKET_FOLDER = 60
"""Bytes. Linux takes 107 of a socket's whole path; Python's own names below the folder need some 45."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.I)


def entry_name(name: str, where: str) -> str:
    """`name`, if it is that of one entry of a folder and can mean nothing else.

    Args:
        where: what it stands in, for the sentence.
    Raises:
        UserError: it is empty, "." or "..", begins with "~", holds a separator, a NUL or another control character, is the name
            of a device, or is longer than file systems take.
    """
    fault = _fault(name)
    if fault:
        raise UserError(f"{where} holds the name {name[:80]!r}, which {fault}: it cannot name a file; rename it there")
    return name


def _fault(name: str) -> str:
    if name in ("", ".", ".."):
        return "is no name of its own"
    if "/" in name or "\\" in name:
        return "has a separator of folders in it"
    if _CONTROL.search(name):
        return "has a control character in it"
    if name.startswith("~"):
        return "begins with ~"
    if _DEVICE.fullmatch(name):
        return "is that of a device"
    return "is too long" if len(name.encode()) > MAX_NAME_BYTES else ""


def below(root: str | os.PathLike[str], name: str, where: str) -> Path:
    """The path of `name` ("a", "a/b") below the folder `root`.

    Raises:
        UserError: a part of the name is none (`entry_name`), or a link on the way leads out of `root`.
    """
    folder = Path(root)
    path = folder.joinpath(*(entry_name(part, where) for part in name.split("/")))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where} holds the name {name!r}, which is a link that leads out of {folder}; remove the link")
    return path


def open_below(root: str | os.PathLike[str], name: str, flags: int, where: str) -> int:
    """A descriptor of the regular file `name` below `root`, opened with `flags`, without following any link below `root`.

    Raises:
        UserError: as `below`; a part of the way is a link, or the file is none (a folder, a device, a pipe).
        FileNotFoundError: there is no such file, and `flags` do not make it.
    """
    *folders, last = (entry_name(part, where) for part in name.split("/"))
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            deeper = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = deeper
        # Without O_NONBLOCK a pipe that nobody writes to would be waited for.
        file = os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=at)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{where}: cannot open {name!r} in {os.fspath(root)} ({error.strerror}); is it a link?"
        ) from None
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{where}: {name!r} in {os.fspath(root)} is not a file; remove it")
    return file


def no_follow(path: str, flags: int) -> int:
    """For `open(..., opener=no_follow)`: what stands in a folder that others may write to is opened, but no link there.

    Raises:
        UserError: `path` is a link.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, and normfree writes to no file behind one; remove it") from None
        raise


def name_of_url(url: str) -> str:
    """One entry's name for a URL: legible at its beginning, and no other URL's."""
    url = url.rstrip("/")
    legible = re.sub(r"[^\w.-]", "-", url.replace("://", "-"), flags=re.ASCII).lstrip(".-")[:120]
    return f"{legible}-{hashlib.sha256(url.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def cache_folder() -> Path:
    """Where this user's caches and records lie, not made yet: NORMFREE_CACHE, else `normfree` below XDG_CACHE_HOME or ~/.cache.

    Where these are not this user's own or cannot be written (a container's HOME=/root for another user), a folder with a random
    name in the temporary folder, which is reported, and which all processes started from here use as well.
    """
    if given := os.environ.get("NORMFREE_CACHE"):
        return Path(given).absolute()
    refused = ""
    for folder in _candidates():
        fault = _unusable(folder)
        if not fault:
            return folder / "normfree"
        refused = refused or f"{folder} {fault}"
    substitute = os.path.join(tempfile.gettempdir(), f"normfree-cache-{secrets.token_hex(8)}")
    os.environ["NORMFREE_CACHE"] = substitute
    print(
        terminal(
            f"normfree: {refused}; what is kept there otherwise is now in {substitute} and stays: set NORMFREE_CACHE to a "
            "folder of yours"
        ),
        file=sys.stderr,
    )
    return Path(substitute)


def _candidates() -> Iterator[Path]:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        yield Path(given)
        return
    homes = [os.environ.get("HOME", "")]
    with contextlib.suppress(KeyError):  # a user without an entry
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    yield from (Path(home) / ".cache" for home in homes if os.path.isabs(home))


def _unusable(folder: Path) -> str:
    """Why a folder, or what is there of the way to it, cannot hold what is ours; empty if it can."""
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        owner = there.stat().st_uid
    except OSError as error:  # not even its parents can be entered
        return f"cannot be entered ({error.strerror})"
    if owner != os.getuid():
        return "belongs to another user" if there == folder else f"is not there, and {there} belongs to another user"
    return "" if os.access(there, os.W_OK | os.X_OK) else "cannot be written"


def private_folder(*names: str) -> Path:
    """The folder `names` below `cache_folder()`, made if need be, of this user alone (mode 0700).

    Raises:
        UserError: something else is in its place: a link, a file, a folder of another user.
    """
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_private(folder)
    for name in names:
        folder = folder / entry_name(name, "a private folder's path")
        make_private(folder)
    return folder


def make_private(folder: Path) -> None:
    """`folder` is there, is this user's, and nobody else may enter it, as in `private_folder`. Its parent must be there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)  # no link: it could lead to another's
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(
            f"{folder} is a link, a file or another user's folder, and must be a folder of yours; move it away"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        os.chmod(folder, 0o700)


def free_bytes(folder: Path) -> int:
    """Room on the disk that holds the folder, or will when it is made."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return shutil.disk_usage(there).free


def socket_folder() -> str:
    """A folder whose path is short enough for Unix sockets: the temporary folder where it is, else /tmp."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= MAX_SOCKET_FOLDER else "/tmp"


def lock(file: int, *, wait: bool) -> bool | None:
    """Lock an open file or folder until it is closed, or its process ends: False where another holds it, None where the file
    system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def temporary_folder(what: str, within: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A private folder with a random name in `within` (the system's temporary folder), removed at the end of the block."""
    path, held = hold_folder(what, within)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)


def hold_folder(what: str, within: str | os.PathLike[str] | None = None) -> tuple[Path, int]:
    """A new folder as `temporary_folder` gives, which the caller removes, and a descriptor that keeps others from removing it.

    The kernel lets go of that when the process ends, however that ends: what a killed one left is removed by the next that
    makes a folder in the same place.
    """
    remove_leftovers(within)
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{what}-", dir=within))
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        lock(held, wait=True)  # on a file system without locks nobody else can take one either
        if path.is_dir():  # between its making and its lock another process may have taken it for a leftover
            return path, held
        os.close(held)


def remove_leftovers(within: str | os.PathLike[str] | None = None) -> None:
    """Remove the temporary folders of this user's processes that are no more."""
    with contextlib.suppress(OSError), os.scandir(within or tempfile.gettempdir()) as entries:
        for entry in entries:
            if not entry.name.startswith(TEMPORARY) or entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            with contextlib.suppress(OSError):  # it is somebody's, or went meanwhile
                held = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if lock(held, wait=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(held)
