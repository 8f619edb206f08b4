"""What a host is: software, limits of processes, memory, names. Nothing is written and nothing is asked of another host."""

import contextlib
import ipaddress
import platform
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator

import psutil

from orchestration.doctor.messages import Examined, Finding
from pipeline import provenance
from pipeline.fitting.host_memory import cgroup_limit_bytes

FILES, FILES_A_RANK = 512, 4
"""Open files of a rank that reads shards, and for each other rank: gloo and NCCL keep connections to it."""
PROCESSES = 2048
"""Of one user: ranks, their loader processes and threads."""
SHM_BYTES = 256 << 20
"""Batches of loader processes wait in shared memory. Containers are given 64 MiB unless somebody asks for more."""
MEMORY_BYTES = 4 << 30
NAME_S = 2.0
"""A name server that takes longer than this, or none, delays each connection between hosts."""


def software() -> Examined:
    """Versions, and which code."""
    facts = {
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": platform.platform(),
        "code": provenance.code_digest()[:16],
        "revision": provenance.code_revision(),
        **{f"library {name}": version for name, version in provenance.deciding_versions().items()},
        "libraries": provenance.libraries(),
    }
    return Examined(facts=facts)


def limits(num_ranks: int) -> Examined:
    """Of this process, as the ranks get them.

    Args:
        num_ranks: of the largest run that these hosts would make.
    """
    facts, findings = {}, []
    needed = {"open files": FILES + FILES_A_RANK * num_ranks, "processes": PROCESSES}
    kinds = {"open files": (resource.RLIMIT_NOFILE, "-n"), "processes": (resource.RLIMIT_NPROC, "-u")}
    for what, (kind, option) in kinds.items():
        soft, hard = resource.getrlimit(kind)
        facts[what] = _limit(soft)
        if soft != resource.RLIM_INFINITY and soft < needed[what]:
            findings.append(
                Finding(
                    what=what,
                    value=f"at most {soft} of a process" if option == "-n" else f"at most {soft} of a user",
                    remedy=f"'ulimit {option} {needed[what]}' before the start, or raise it in /etc/security/limits.conf "
                    f"(the hard limit is {_limit(hard)})",
                )
            )
    return Examined(facts=facts, findings=findings)


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def memory() -> Examined:
    """Main memory, the share of it that this process may use, swap, shared memory."""
    found, swap = psutil.virtual_memory(), psutil.swap_memory()
    facts = {"memory": f"{found.total / 2**30:.1f} GiB, {found.available / 2**30:.1f} GiB available"}
    findings = []
    usable_bytes = found.available
    limit = cgroup_limit_bytes()
    if limit is not None and limit < found.total:
        facts["memory limit"] = f"{limit / 2**30:.1f} GiB (of this container or job)"
        usable_bytes = min(usable_bytes, limit)
    if usable_bytes < MEMORY_BYTES:
        value = f"{usable_bytes / 2**30:.1f} GiB can be used"
        findings.append(
            Finding(what="memory", value=value, remedy="end what else runs there, or raise the job's limit")
        )
    if swap.used > found.total / 20:
        value = f"{swap.used / 2**30:.1f} GiB are swapped out"
        findings.append(
            Finding(
                what="swap", value=value, remedy="a rank that swaps holds up all others; free memory", is_fault=False
            )
        )
    with contextlib.suppress(FileNotFoundError):
        shm = shutil.disk_usage("/dev/shm")
        facts["/dev/shm"] = f"{shm.total / 2**20:.0f} MiB, {shm.free / 2**20:.0f} MiB free"
        if shm.free < SHM_BYTES:
            remedy = f"containers: --shm-size 8g, or an emptyDir of medium Memory at /dev/shm; {SHM_BYTES >> 20} MiB at least"
            findings.append(Finding(what="/dev/shm", value=facts["/dev/shm"], remedy=remedy))
    return Examined(facts=facts, findings=findings)


def names(num_hosts: int) -> Examined:
    """What this host's own name stands for: between hosts, gloo gives that address to the others."""
    host = socket.gethostname()
    findings, begin_s = [], time.monotonic()
    addresses = list(dict.fromkeys(_addresses(host)))
    passed_s = time.monotonic() - begin_s
    facts = {"name": f"{host} ({', '.join(addresses) or 'resolves to nothing'})"}
    if num_hosts > 1 and addresses and all(ipaddress.ip_address(a).is_loopback for a in addresses):
        findings.append(
            Finding(
                what="name",
                value=f"{host} stands for {addresses[0]} there: no other host reaches it, and some connections wait 100 s",
                remedy=f"give {host} its real address in /etc/hosts, or set GLOO_SOCKET_IFNAME to the hosts' interface",
            )
        )
    if passed_s > NAME_S:
        remedy = "let /etc/nsswitch.conf say 'hosts: files', or mend the name server"
        value = f"looking up {host} took {passed_s:.0f} s"
        findings.append(Finding(what="name server", value=value, remedy=remedy, is_fault=num_hosts > 1))
    return Examined(facts=facts, findings=findings)


def _addresses(host: str, limit_s: float = 15.0) -> Iterator[str]:
    """Those that come in time; a look-up cannot be interrupted."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            found.extend(str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(limit_s)
    yield from found
