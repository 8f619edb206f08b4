"""What a list of images may name: a list can come from anybody, and what it names is copied into the dataset.

By default that is what lies next to or below the list itself; `--allow-root` adds folders and addresses. All else is skipped
unread, under its reason. Links are followed before the place is judged. Chains of file systems (`zip://...::http://...`) and
hosts that only a machine's own network knows (169.254.x.x, where clouds keep credentials) are never read.
"""

import errno
import functools
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Sequence
from urllib.parse import urlsplit

from pipeline.data.sources.archives.locators import Locator, Refused, Whole
from pipeline.errors import UserError
from pipeline.storage import objects

_OUTSIDE = Refused("outside the folder of the list, so it was not read; --allow-root PLACE adds a place")
_CHAIN = Refused("a chain of addresses, which is not read")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_LINK_LOCAL = Refused("an address of the machine's own link, which is never read")


class AllowedPlaces:
    """Places below the folder of a list and below `roots`, each a local folder or an address like `s3://bucket/photos`."""

    def __init__(self, source: str, roots: Sequence[str] = ()) -> None:
        self._folder = source.rpartition("/")[0] or ("/" if source.startswith("/") else ".")
        places = [self._folder, *roots]
        for root in roots:
            if "::" in root or (not objects.is_local(root) and is_link_local(root)):
                raise UserError(
                    f"--allow-root {root}: give a folder, or an address like s3://bucket/photos or https://host/"
                )
        self._real_folders: dict[str, str] = {}
        self._local = [os.path.realpath(objects.local_path(place)) for place in places if objects.is_local(place)]
        self._remote = [_normal(place).rstrip("/") for place in places if not objects.is_local(place)]

    def locate(self, path: str) -> tuple[str, Locator, int]:
        """(what two rows of one file share, where its bytes are or why they are not read, bytes or -1) of a list's path."""
        if "://" in path and "::" in path:
            return path, _CHAIN, -1
        url = path if "://" in path or path.startswith(("/", "~/")) else f"{self._folder}/{path}"
        return self._local_place(url) if objects.is_local(url) else self._address(url)

    def allows(self, place: str) -> bool:
        """Whether `place` is one that `locate` gave, be the file still there or not."""
        same, locator, _ = self.locate(place)
        return same == place and locator not in (_OUTSIDE, _CHAIN, _LINK_LOCAL)

    def _local_place(self, url: str) -> tuple[str, Locator, int]:
        try:
            folder, name = os.path.split(os.path.abspath(objects.local_path(url)))
        except UserError:  # the home of a user that there is not
            return url, _OUTSIDE, -1
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        if not any(real.startswith(root.rstrip("/") + "/") for root in self._local):
            return real, _OUTSIDE, -1
        try:
            status = os.stat(real)
        except OSError as error:
            return real, Refused("no such file" if error.errno in _MISSING else f"{error.strerror}"), -1
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or other special file"
            return real, Refused(f"{what}, no image"), -1
        return real, Whole(real), status.st_size

    def _address(self, url: str) -> tuple[str, Locator, int]:
        real = _normal(url)
        if _climbs(real) or not any(real.startswith(root + "/") for root in self._remote):
            return real, _OUTSIDE, -1
        return real, _LINK_LOCAL if is_link_local(real) else Whole(real), -1


def _normal(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme.lower()}://{'/'.join(part for part in rest.split('/') if part != '.')}"


def _climbs(url: str) -> bool:
    """Whether a part of an address is `..`, in any spelling that a server may take for it."""
    return ".." in re.split(r"[/\\?#]", re.sub("%2e", ".", re.sub("%2f|%5c", "/", url, flags=re.I), flags=re.I))


@functools.lru_cache(maxsize=4096)
def _addresses(host: str) -> tuple[str, ...]:
    try:
        return tuple(str(found[4][0]) for found in socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return ()  # no such host: reading says so


def is_link_local(url: str) -> bool:
    """Whether an http address leads to a host of the machine's own link, by number or by name."""
    if not url.lower().startswith(("http://", "https://")):
        return False
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return True
    found = [ipaddress.ip_address(address.partition("%")[0]) for address in _addresses(host)]
    return any((getattr(address, "ipv4_mapped", None) or address).is_link_local for address in found)
