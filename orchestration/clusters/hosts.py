"""The machines that a run is launched on: a list, or a hostfile as OpenMPI and DeepSpeed read it ("host slots=N")."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

MAX_HOSTS = 4096
MAX_SLOTS = 1024
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?|[0-9a-fA-F:]+")
"""[user@]name, or an address; nothing that a shell or ssh would take for something else."""
_SLOTS = re.compile(r"slots=(\d{1,6})")
_IGNORED = re.compile(r"max[-_]slots=\d{1,6}")


@dataclass(frozen=True)
class Host:
    """One machine, by the name that ssh takes."""

    name: str
    slots: int | None = None
    """Processes that its line of a hostfile gives it."""

    @property
    def label(self) -> str:
        """Its name without a user."""
        return self.name.rpartition("@")[2]


def from_list(text: str) -> list[Host]:
    """`a,b,user@c`. UserError: no name, one that cannot be one, or one that stands twice."""
    return _unique([Host(_name(name.strip(), "--hosts")) for name in text.split(",") if name.strip()], "--hosts")


def from_file(path: str) -> list[Host]:
    """The hosts of a hostfile: one a line, `slots=N` after the name, # begins a comment.

    Raises:
        UserError: no such file, a word that no hostfile has, a name that stands twice.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the hostfile {path} cannot be read ({error}); give a file with one 'HOST slots=N' a line"
        ) from None
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where, slots = f"{path}, line {number}", None
        for word in words[1:]:
            found = _SLOTS.fullmatch(word)
            if found and 1 <= int(found[1]) <= MAX_SLOTS and slots is None:
                slots = int(found[1])
            elif not _IGNORED.fullmatch(word):
                raise UserError(f"{where}, has {word[:60]!r}; a line is 'HOST slots=N', N from 1 to {MAX_SLOTS}")
        hosts.append(Host(_name(words[0], where), slots))
    return _unique(hosts, path)


def processes_per_host(hosts: Sequence[Host], asked: int | None) -> int:
    """How many ranks each host runs: what was asked for, else the slots of the hostfile, else 1.

    Raises:
        UserError: below 1; hosts of unlike slots, since all hosts run equally many ranks.
    """
    if asked is not None:
        if not 1 <= asked <= MAX_SLOTS:
            raise UserError(f"--processes-per-host is {asked}; set it to 1 to {MAX_SLOTS}")
        short = [h for h in hosts if h.slots is not None and h.slots < asked]
        if short:
            raise UserError(
                f"--processes-per-host is {asked}, and the hostfile gives {short[0].name} {short[0].slots} "
                "slots; lower it, or correct the file"
            )
        return asked
    first = hosts[0]
    for host in hosts:
        if host.slots != first.slots:
            raise UserError(
                f"the slots differ: {first.name} has {_slots(first)} and {host.name} {_slots(host)}; every host runs "
                "equally many ranks, so give them the same, or set --processes-per-host"
            )
    return first.slots or 1


def _slots(host: Host) -> str:
    return "none" if host.slots is None else str(host.slots)


def _name(name: str, where: str) -> str:
    if len(name) > 255 or not _NAME.fullmatch(name):
        raise UserError(f"{where}: {name[:80]!r} is no name of a host; give HOST or USER@HOST as ssh takes it")
    return name


def _unique(hosts: list[Host], where: str) -> list[Host]:
    if not hosts:
        raise UserError(f"{where} names no host; give at least one")
    if len(hosts) > MAX_HOSTS:
        raise UserError(f"{where} names {len(hosts)} hosts; {MAX_HOSTS} at most are launched over ssh")
    seen: set[str] = set()
    for host in hosts:
        if host.label.lower() in seen:
            raise UserError(
                f"{where} names {host.label} twice; leave one of them out, and set slots=N or "
                "--processes-per-host for several ranks"
            )
        seen.add(host.label.lower())
    return hosts
