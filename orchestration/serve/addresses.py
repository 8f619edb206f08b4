"""Under which names a server of this machine is reached."""

import ipaddress
import socket
from collections.abc import Sequence

import psutil

EVERYWHERE = ("0.0.0.0", "")
"""Hosts that mean every interface (IPv4)."""
LOCAL_HOSTS = (
    *("localhost", "localhost:*", "127.0.0.1", "127.0.0.1:*", "[::1]", "[[]::1]:*", "192.168.*", "10.*"),
    *(f"172.{i}.*" for i in range(16, 32)),
)
"""Patterns (fnmatch) of the Host header that MLflow takes by itself: of this machine, and of private networks (RFC 1918), whose
addresses a container does not know to be its machine's."""


def names(host: str) -> list[str]:
    """Names and IPv4 addresses that lead to a server that listens on `host`."""
    if host not in EVERYWHERE:
        return [host]
    own = [a.address for each in psutil.net_if_addrs().values() for a in each if a.family == socket.AF_INET]
    return list(dict.fromkeys(["localhost", *own, socket.gethostname(), socket.getfqdn()]))


def reachable(host: str) -> str:
    """`host`, or the address of this machine that others can call where `host` means every interface."""
    if host not in EVERYWHERE:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737; nothing is sent, the kernel only chooses its way out
            return str(probe.getsockname()[0])
        except OSError:  # no network
            pass
    others = [name for name in names(host) if not is_loopback(name)]
    return others[0] if others else "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether nobody else than this machine reaches `host`; a name that nobody knows is taken for another machine's."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False


def allowed(scheme: str, own: Sequence[str], port: int, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Values of the Host header and of the Origin header that MLflow takes: names of this machine, and the names `given` by the
    user, under which a proxy with another port and TLS may serve it."""
    hosts = [value for name in (*own, *given) for value in (name, f"{name}:*")]
    pages = [f"{scheme}://{name}:{port}" for name in (*own, *given)]
    pages += [f"{each}://{name}" for name in given for each in ("http", "https")]
    return hosts, pages
