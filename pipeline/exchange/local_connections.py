"""Whose the other end of a connection on this machine is: the kernel's word, in /proc/net/tcp.

The loopback is for all users of a machine, and gloo's connections between ranks have no password.
"""

import contextlib
import ipaddress
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
LISTENS = "0A"
"""linux/include/net/tcp_states.h"""


class Socket(NamedTuple):
    local: tuple[Any, int]
    remote: tuple[Any, int]
    state: str
    user: int
    inode: str


def sockets(tables: tuple[str, ...] = TABLES) -> Iterator[Socket]:
    """All of this machine (of its name space of networks) that a process holds; none where there is no Linux.

    What its process has closed belongs to nobody, and is listed by the kernel as the superuser's without an inode.
    """
    for table in tables:
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                row = line.split()
                if row[9] != "0":
                    yield Socket(_listed(row[1]), _listed(row[2]), row[3], int(row[7]), row[9])


def owner(client: tuple[str, int], server: tuple[str, int], tables: tuple[str, ...] = TABLES) -> int | None:
    """The user whose process on this machine holds the client's end of a connection; None for any other connection."""
    ends = _end(*client), _end(*server)
    return next((found.user for found in sockets(tables) if (found.local, found.remote) == ends), None)


def refuse_strangers(num_ranks: int) -> None:
    """UserError where one of several ranks listens on a port to which another user of this machine is connected.

    To be asked when the processes of a group have just connected: who came between two of them still holds that connection.
    """
    if num_ranks == 1:  # nobody stands at the other end
        return
    own = set()
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            own.add(os.readlink(f"/proc/self/fd/{name}"))
    there = list(sockets())
    places = {found.local for found in there if found.state == LISTENS and f"socket:[{found.inode}]" in own}
    trusted = (0, os.getuid())  # who is the superuser need not come between ranks
    strangers = sorted({found.user for found in there if found.remote in places and found.user not in trusted})
    if strangers:
        raise UserError(
            f"a process of user {strangers[0]} of this machine is connected to a rank of this run, whose ports know no password; "
            "start again, and run in a container or name space with a network of its own where users do not trust each other"
        )


def _end(host: str, port: int) -> tuple[Any, int]:
    address = ipaddress.ip_address(host.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address, port


def _listed(text: str) -> tuple[Any, int]:
    """ "0100007F:1388" -> 127.0.0.1, 5000: words of 32 bits in the machine's order of bytes."""
    host, port = text.split(":")
    words = (int(host[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(host), 8))
    return _end(str(ipaddress.ip_address(b"".join(words))), int(port, 16))
