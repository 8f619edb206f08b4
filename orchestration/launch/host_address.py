"""By which address other hosts reach this one, and by which network interface: as it reaches the store of the job.

A host's own name does not tell: on Debian it means 127.0.1.1 by default, where no other host gets to.
"""

import socket

from pipeline.errors import UserError


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
    import psutil

    return next(
        (name for name, found in psutil.net_if_addrs().items() if any(a.address == address for a in found)),
        "",
    )


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface. Raises UserError if there is no such interface, or it has none."""
    import psutil

    found = psutil.net_if_addrs()
    for each in found.get(interface, ()):
        if each.family == socket.AF_INET:
            return str(each.address)
    there = ", ".join(sorted(found))
    raise UserError(
        f"{socket.gethostname()} has no network interface {interface!r} with an IPv4 address; there are {there}"
    )
