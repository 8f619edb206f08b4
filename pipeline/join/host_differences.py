"""What the hosts of a run differ in: who has which value, what is to be done, and the table of it."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.display import shortened

MAX_ROWS = 40
MAX_HOSTS = 3
"""Named for one value; of more the number is given."""
WIDTH = 40
KINDS = {
    "code": ("code", "install the same version of normfree on all hosts, or share one checkout"),
    "revision": ("code", "install the same version of normfree on all hosts, or share one checkout"),
    "library": ("libraries", "install the same versions on all hosts (constraints.txt)"),
    "devices": ("devices", "use hosts of one kind, with all their devices"),
    "field": ("", "start all hosts with the same command"),
    "data": ("", "copy the dataset again, or give one place with --data.url"),
    "name": ("", "set GLOO_SOCKET_IFNAME to the interface between the hosts, or mend /etc/hosts"),
    "--out": (
        "",
        "set --out to a folder that all hosts share, by the same path from the root on, or to s3://bucket/...",
    ),
    "clock": ("clock", "set the clocks (chrony, ntpd)"),
}
"""By the first word of what differs: the kind that `join.allow` knows ("": not to be allowed), and what is to be done."""
UNKNOWN = ("", KINDS["code"][1])
"""What only another version of normfree says of itself."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something in which ranks are not alike."""

    what: str
    values: Mapping[str, Sequence[tuple[str, int]]]
    """The different values, the main rank's first, and (host, rank) of who has it; () = all that have no other."""
    is_refused: bool = True
    """Unless it is allowed."""
    text: str = ""
    """A sentence, where "differ in" does not say it."""

    @property
    def kind(self) -> str:
        return KINDS.get(self.what.split(" ")[0], UNKNOWN)[0]

    @property
    def remedy(self) -> str:
        return KINDS.get(self.what.split(" ")[0], UNKNOWN)[1]


def of_facts(main: Mapping[str, str], answers: Mapping[int, tuple[str, Mapping[str, str]]]) -> list[Difference]:
    """Args:
    main: the facts of the main rank.
    answers: by rank, its host and its values of those facts that differ; of the main rank none.
    """
    names = dict.fromkeys(name for _, differing in answers.values() for name in differing)
    found = []
    for name in names:
        values: dict[str, list[tuple[str, int]]] = {main.get(name, "none"): []}
        for rank, (host, differing) in sorted(answers.items()):
            values.setdefault(differing.get(name, main.get(name, "none")), []).append((host, rank))
        found.append(Difference(what=name, values=values, is_refused=name != "revision"))
    return found


def own_names(who: Mapping[int, tuple[str, str]]) -> list[Difference]:
    """Of ranks, by number, (host, loopback address that its own name stands for, or "").

    gloo would give the others that address: some connections are refused at once, others after 100 s.
    """
    values: dict[str, list[tuple[str, int]]] = {}
    for rank, (host, address) in sorted(who.items()):
        if address:
            values.setdefault(address, []).append((host, rank))
    if not values:
        return []
    text = "; ".join(f"the name of {hosts_of(ranks)} stands for {address} there" for address, ranks in values.items())
    return [Difference(what="name", values=values, text=f"{text}, where no other host reaches it")]


def folders(seen: Mapping[int, tuple[str, str, str]]) -> list[Difference]:
    """Of ranks, by number, (host, its `--out`, why the main rank's mark is not there, or "")."""
    values: dict[str, list[tuple[str, int]]] = {}
    for rank, (host, where, reason) in sorted(seen.items()):
        values.setdefault(f"{where} ({reason})" if reason else where, []).append((host, rank))
    first = next((rank for rank, (*_, reason) in sorted(seen.items()) if reason), None)
    if first is None:
        return []
    (host, where, reason), (main_host, main_where, _) = seen[first], seen[0]
    text = (
        f"rank {first} on {host} does not find in {where} what rank 0 on {main_host} wrote to {main_where} ({reason})"
    )
    return [Difference(what="--out", values=values, text=text)]


def clocks(ahead: Mapping[int, tuple[str, float]], *, reported_s: float, refused_s: float) -> list[Difference]:
    """Of ranks, by number, (host, seconds that its clock is ahead of the main rank's)."""
    late = {rank: found for rank, found in sorted(ahead.items()) if abs(found[1]) > reported_s}
    if not late:
        return []
    values: dict[str, list[tuple[str, int]]] = {
        "as on rank 0": [(h, r) for r, (h, _) in ahead.items() if r not in late]
    }
    for rank, (host, ahead_s) in late.items():
        by = f"{abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
        values.setdefault(by, []).append((host, rank))
    is_refused = any(abs(ahead_s) > refused_s for _, ahead_s in late.values())
    return [Difference(what="clock", values=values, is_refused=is_refused)]


def divide(
    differences: Sequence[Difference], allow: Collection[str], notes: Mapping[str, str]
) -> tuple[list[Difference], dict[str, str]]:
    """Those that refuse the run, and `notes` with a sentence about each of the others."""
    refused = [d for d in differences if d.is_refused and d.kind not in allow]
    if refused:  # the revision tells which code it is
        refused += [d for d in differences if d.what == "revision" and any(r.what == "code" for r in refused)]
    return refused, {**notes, **{d.what: _values(d) for d in differences if d not in refused}}


def sentence(differences: Sequence[Difference]) -> str:
    first = differences[0]
    if first.text:
        return f"{first.text}; {first.remedy}"
    kinds = dict.fromkeys(d.kind for d in differences if d.kind)
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    allow = f", or allow it with --join.allow {','.join(kinds)}" if kinds and all(d.kind for d in differences) else ""
    return f"the hosts of this run differ in {first.what}{more}: {_values(first)}; {first.remedy}{allow}"


def table(differences: Sequence[Difference]) -> list[str]:
    """Lines: what, value, hosts; under them what is to be done."""
    rows = [("differs", "value", "hosts")]
    for difference in differences:
        for number, (value, who) in enumerate(difference.values.items()):
            rows.append(("" if number else difference.what, value, hosts_of(who)))
    cut = rows[: MAX_ROWS + 1]
    cells = [(shortened(a, WIDTH), shortened(b, WIDTH), shortened(c, 3 * WIDTH)) for a, b, c in cut]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in cells]
    return [*lines, *([f"... {len(rows) - len(cut)} lines more"] if len(rows) > len(cut) else [])]


def _values(difference: Difference) -> str:
    found = [f"{shortened(value, 2 * WIDTH)} on {hosts_of(who)}" for value, who in difference.values.items()]
    return "; ".join(
        [*found[:MAX_HOSTS], *([f"{len(found) - MAX_HOSTS} values more"] if len(found) > MAX_HOSTS else [])]
    )


def hosts_of(who: Sequence[tuple[str, int]]) -> str:
    """`h0 (ranks 0-7), h1 (rank 8) and 12 hosts more`."""
    by_host: dict[str, list[int]] = {}
    for host, rank in who:
        by_host.setdefault(host, []).append(rank)
    named = [f"{host} ({_ranks(ranks)})" for host, ranks in itertools.islice(by_host.items(), MAX_HOSTS)]
    rest = len(by_host) - len(named)
    return ", ".join(named) + (f" and {rest} host{'s' if rest > 1 else ''} more" if rest else "")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    is_run = ranks[-1] - ranks[0] == len(ranks) - 1
    return (
        f"ranks {ranks[0]}-{ranks[-1]}"
        if is_run
        else f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
    )
