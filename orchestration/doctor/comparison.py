"""What only several hosts together show: who differs from the others, whose clock is off, who is slow. Pure functions."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from orchestration.doctor.messages import Examined, Finding, Link, Sweep
from pipeline.join.host_differences import KINDS

COMPARED = ("code", "revision", "devices", "data")
"""Facts that must be the same, besides versions ("library ...")."""
CLOCK_S = 5.0
SLOW_SHARE = 0.5
"""A host whose best link has less than this share of what the others' best have is named."""
SLOW_BYTES_S = 12.5e6
"""100 Mbit/s: a step of the smallest network here would wait longer for its gradient than it computes."""
LATE_S, LATE_TIMES = 0.002, 4.0
MAX_NAMES = 4


def differences(examined: Mapping[str, Examined]) -> list[Finding]:
    """Those hosts whose facts are not those of most; of two alike numbers of hosts, the first host's are held to be right."""
    names = dict.fromkeys(name for found in examined.values() for name in found.facts)
    findings = []
    for name in names:
        if name not in COMPARED and not name.startswith("library "):
            continue
        values = {host: found.facts.get(name, "none") for host, found in examined.items()}
        usual, _ = Counter(values.values()).most_common(1)[0]
        alike = [host for host, value in values.items() if value == usual]
        findings += [
            Finding(
                host=host,
                what=name,
                value=f"{value}; {_list(alike)}: {usual}",
                remedy=KINDS[name.split(" ")[0]][1],
                is_fault=name != "revision",
            )
            for host, value in values.items()
            if value != usual
        ]
    return findings


def clocks(ahead: Mapping[str, float]) -> list[Finding]:
    """Args:
    ahead: of each host, seconds that its clock is ahead of this machine's, which may be wrong itself where most say so.
    """
    usual_s = statistics.median(ahead.values()) if len(ahead) > 2 else 0.0
    return [
        Finding(
            host=host,
            what="clock",
            value=f"{abs(off_s - usual_s):.0f} s {'ahead' if off_s > usual_s else 'behind'}",
            remedy=KINDS["clock"][1],
        )
        for host, off_s in ahead.items()
        if abs(off_s - usual_s) > CLOCK_S
    ]


def pairs(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Who measures against whom, in rounds in which nobody is twice: of 8 hosts all pairs, of more those at distances 1, 2, 4.

    So the rounds grow with the logarithm of the hosts.
    """
    number = len(names)
    distances = range(1, number) if number <= 8 else [1 << k for k in range((number - 1).bit_length())]
    todo = dict.fromkeys(
        (min(i, j), max(i, j)) for d in distances for i in range(number) if (j := (i + d) % number) != i
    )
    rounds: list[list[tuple[str, str]]] = []
    while todo:
        busy: set[int] = set()
        taken: list[tuple[str, str]] = []
        for one, other in list(todo):
            if not {one, other} & busy:
                busy |= {one, other}
                taken.append((names[one], names[other]))
                del todo[one, other]
        rounds.append(taken)
    return rounds


def links(measured: Mapping[tuple[str, str], Link]) -> list[Finding]:
    """Links that are none, hosts that are slower than the others, and a network that is slow as a whole."""
    findings = [
        Finding(
            host=one,
            what="port",
            value=f"does not reach {other}: {link.error}",
            remedy=f"open all ports between the hosts of a run on {other} and {one}, and look at the cable",
        )
        for (one, other), link in measured.items()
        if link.error
    ]
    good = {pair: link for pair, link in measured.items() if not link.error}
    rates, trips = _best(good, lambda link: -link.bytes_s), _best(good, lambda link: link.round_trip_s)
    named: set[str] = set()
    if len(rates) > 2:
        usual = statistics.median(-rate for rate in rates.values())
        for host, rate in rates.items():
            if -rate < SLOW_SHARE * usual:
                named.add(host)
                value = f"straggler: its best link has {_rate(-rate)}, the others' {_rate(usual)}"
                findings.append(
                    Finding(host=host, what="network", value=value, remedy="look at its cable, port and driver")
                )
        usual_s = statistics.median(trips.values())
        for host, trip_s in trips.items():
            if trip_s > max(LATE_TIMES * usual_s, usual_s + LATE_S):
                named.add(host)
                value = (
                    f"straggler: its shortest round trip is {trip_s * 1e3:.1f} ms, the others' {usual_s * 1e3:.1f} ms"
                )
                findings.append(Finding(host=host, what="network", value=value, remedy="look at its way to the others"))
    for (one, other), link in good.items():
        if link.bytes_s < SLOW_BYTES_S and not {one, other} & named:
            value = f"{_rate(link.bytes_s)} to {other}, {link.round_trip_s * 1e3:.1f} ms"
            findings.append(
                Finding(
                    host=one, what="network", value=value, remedy="a step waits for its gradient: 1 Gbit/s at least"
                )
            )
    return findings


def _best(measured: Mapping[tuple[str, str], Link], cost: Callable[[Link], float]) -> dict[str, float]:
    """Of each host, the least of its links."""
    best: dict[str, float] = {}
    for pair, link in measured.items():
        for host in pair:
            best[host] = min(best.get(host, float("inf")), cost(link))
    return best


def sweep(found: Sweep) -> list[Finding]:
    if not found.error:
        return []
    return [
        Finding(
            what="all-reduce",
            value=f"{found.num_ranks} ranks do not compute together: {found.error}",
            remedy="open all ports between the hosts; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to their interface",
        )
    ]


def _rate(bytes_s: float) -> str:
    bits = bytes_s * 8
    return f"{bits / 1e9:.1f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mbit/s"


def _list(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
