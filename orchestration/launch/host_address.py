"""By which address other hosts reach this one, and by which network interface: as it reaches the job's store, or as ssh came.

A host's own name does not tell: on Debian it means 127.0.1.1 by default, where no other host gets to.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.errors import UserError


@dataclass(frozen=True)
class Reached:
    """How somebody has reached this host over ssh; empty where nobody has."""

    by: str
    """Address of who reached it, as this host sees it."""
    address: str
    """Under which it was reached."""
    interface: str
    """Of that address."""


def over_ssh() -> Reached:
    """By what sshd tells its child."""
    by, _, address, _ = (*os.environ.get("SSH_CONNECTION", "").split(), "", "", "", "")[:4]
    return Reached(by, address, interface_of(address))


def num_gpus() -> int:
    """GPUs that the driver of this host has, asked of nobody but the kernel."""
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def own_address(store: str, port: int) -> str:
    """Raises UserError where no network leads to `store`."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(store, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as unsent:
            unsent.connect(place)  # sends nothing: it asks for the way
            return str(unsent.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"no way from {socket.gethostname()} to the job's store at {store}:{port} ({error.strerror or error}); give an "
            "address that every host reaches"
        ) from None


def interface_of(address: str) -> str:
    """The name of the network interface that has this address; empty if none has."""
    for name, found in psutil.net_if_addrs().items():
        if any(address in (a.address, a.address.partition("%")[0]) for a in found):  # with its zone, or without
            return str(name)
    return ""


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface. Raises UserError if there is no such interface, or it has none."""
    found = psutil.net_if_addrs()
    for each in found.get(interface, ()):
        if each.family == socket.AF_INET:
            return str(each.address)
    there = ", ".join(sorted(found))
    raise UserError(
        f"{socket.gethostname()} has no network interface {interface!r} with an IPv4 address; there are {there}"
    )
