"""The machines that a run is launched on: a list, or a hostfile as OpenMPI and DeepSpeed read it ("host slots=N")."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestration.clusters.remote import Ready
from pipeline.errors import UserError
from pipeline.supervision.stop_signals import say

MAX_HOSTS = 4096
MAX_SLOTS = 1024
CLOCK_S = 10.0
"""torch's rendezvous stamps signs of life by each host's own clock, and forgets a host after 15 s without one."""
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


def compare(found: Mapping[str, Ready], ahead_s: Mapping[str, float], processes: int) -> None:
    """What can be seen before anything starts.

    Args:
        found: by label, what each host says of itself.
        ahead_s: by label, of this machine's clock.
        processes: ranks a host.
    Raises:
        UserError: two names of one machine; clocks too far apart; another revision of normfree, or other versions of its
            libraries.
    """
    _compare_clocks(ahead_s)
    names: dict[str, str] = {}
    for label, ready in found.items():
        if (other := names.setdefault(ready.machine, label)) != label:
            raise UserError(
                f"{other} and {label} are the same machine ({ready.host}); name it once, and set slots=N or "
                "--processes-per-host for several ranks"
            )
    first, *others = found.values()
    for other_host in others:
        for what in ("revision", "versions"):
            a, b = getattr(first, what), getattr(other_host, what)
            if a != b:
                raise UserError(
                    f"the hosts differ: {first.host} has {_unlike(a, b)} and {other_host.host} {_unlike(b, a)}; "
                    "install the same on all"
                )
    short = [r for r in found.values() if r.num_gpus > processes]
    if short:
        say(f"{short[0].host} has {short[0].num_gpus} GPUs and runs {processes} ranks: --processes-per-host uses more")


def _compare_clocks(ahead_s: Mapping[str, float]) -> None:
    middle = statistics.median(ahead_s.values())
    worst = max(ahead_s, key=lambda label: (round(abs(ahead_s[label] - middle)), abs(ahead_s[label])))
    near = min(ahead_s, key=lambda label: abs(ahead_s[label] - middle) if label != worst else math.inf)
    by_s = ahead_s[worst] - ahead_s[near]
    if abs(by_s) > CLOCK_S:
        raise UserError(
            f"the clock of {worst} is {abs(by_s):.0f} s {'ahead of' if by_s > 0 else 'behind'} that of {near}; set the clocks "
            "(chrony, ntpd): where they differ hosts take each other for dead"
        )


def _unlike(a: str, b: str) -> str:
    """The parts of a comma-separated text that another does not have."""
    others = set(b.split(", "))
    return ", ".join(part for part in a.split(", ") if part not in others) or a or "nothing"
