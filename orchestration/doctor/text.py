"""A doctor's report for people: what is to be mended, what is worth knowing, what was measured."""

import textwrap
from collections.abc import Sequence

from orchestration.doctor.examination import Report
from orchestration.doctor.messages import Finding, Sweep
from pipeline.display import shortened

WIDTH = 100
MAX_LINES = 60
MAX_HOSTS = 8
"""Of more hosts, facts are shown of the first alone: those in which others differ are among what is to be mended."""


def lines(report: Report) -> list[str]:
    """The whole report; what matters most comes last, where a terminal shows it."""
    shown = list(report.facts)[: 1 if len(report.facts) > MAX_HOSTS else None]
    text = [line for host in shown for line in _facts(host, report)]
    text += _network(report)
    notes = [finding for finding in report.findings if not finding.is_fault]
    text += _findings("worth knowing", notes) + _findings("to be mended", report.faults)
    num = len({finding.host for finding in report.faults})
    many = f"{len(report.facts)} hosts examined" if len(report.facts) > 1 else "this host examined"
    end = f"{len(report.faults)} to be mended on {num} host{'s' if num > 1 else ''}" if report.faults else "all is well"
    return [*text, f"{many}: {end}"]


def _facts(host: str, report: Report) -> list[str]:
    facts = report.facts[host]
    width = max(map(len, facts), default=0)
    return [f"{host}", *(f"  {name:{width}}  {shortened(value, 2 * WIDTH)}" for name, value in facts.items()), ""]


def _network(report: Report) -> list[str]:
    good = [(pair, link) for pair, link in report.links.items() if not link.error]
    if not good:
        return []
    (slow, slowest), (far, latest) = min(good, key=lambda p: p[1].bytes_s), max(good, key=lambda p: p[1].round_trip_s)
    slow_text = f"slowest {slowest.bytes_s * 8 / 1e6:,.0f} Mbit/s ({' - '.join(slow)})"
    late_text = f"longest round trip {latest.round_trip_s * 1e3:.2f} ms ({' - '.join(far)})"
    text = ["network", f"  {len(good)} pairs of hosts measured; {slow_text}, {late_text}"]
    return [*text, *(_sweep(report.sweep) if report.sweep and report.sweep.seconds else []), ""]


def _sweep(sweep: Sweep) -> list[str]:
    text = [f"  all-reduce, {sweep.backend}, {sweep.num_ranks} ranks"]
    for size, spent_s in sweep.seconds.items():
        rate = int(size) / spent_s * 8 / 1e6
        text.append(f"    {_size(int(size)):>8}  {spent_s * 1e3:9.2f} ms  {rate:10,.0f} Mbit/s")
    return text


def _size(number: int) -> str:
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


def _findings(title: str, findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    text = [title]
    for finding in findings:
        remedy = f": {finding.remedy}" if finding.remedy else ""
        row = f"{finding.host}  {finding.what}  {shortened(finding.value, 4 * WIDTH)}{remedy}"
        text += textwrap.wrap(row, WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    return [
        *text[:MAX_LINES],
        *([f"  ... {len(text) - MAX_LINES} lines more (--json has all)"] if len(text) > MAX_LINES else []),
        "",
    ]
