"""What a profile's events come to: how its time divides over our phases, and the operations that take most of it."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.records import ProfileRow

PHASES = ("data", "transfer", "forward", "backward", "reduce", "clip", "update", "records", "evaluation", "saving")
OTHER = "other"
LARGEST = 10


@dataclass(frozen=True, kw_only=True)
class Event:
    """A stretch of the profile, in microseconds."""

    name: str
    begin_us: float
    end_us: float
    phase: str = ""
    """Which it is a range of; "" of an operation."""
    self_us: float = 0.0
    """Of an operation: on the host, without the operations inside it."""
    device_us: float = 0.0
    """Of kernels that it started itself."""


def phases(events: Sequence[Event], *, num_steps: int, wall_us: float) -> list[ProfileRow]:
    """Each moment of the host belongs to the phase that began last and has not ended; a kernel to the one that started it,
    from whichever thread: a backward pass starts its own from threads of autograd's."""
    ranges = sorted((e for e in events if e.phase), key=lambda e: (e.begin_us, -e.end_us))
    operations = sorted((e for e in events if not e.phase and e.device_us), key=lambda e: e.begin_us)
    host, device, calls = defaultdict[str, float](float), defaultdict[str, float](float), defaultdict[str, int](int)
    open_: list[tuple[float, int]] = []  # by (minus begin, place): the innermost first
    begins = iter([*enumerate(ranges), (len(ranges), None)])
    moments = sorted({e.begin_us for e in ranges} | {e.end_us for e in ranges})
    place, one = next(begins)
    kernels = iter([*operations, None])
    kernel = next(kernels)
    for moment, until in zip(moments, [*moments[1:], float("inf")], strict=True):
        while one is not None and one.begin_us <= moment:
            heapq.heappush(open_, (-one.begin_us, -place))
            calls[one.phase] += 1
            place, one = next(begins)
        while open_ and ranges[-open_[0][1]].end_us <= moment:
            heapq.heappop(open_)
        while kernel is not None and kernel.begin_us < moment:  # before the first range
            device[OTHER] += kernel.device_us
            kernel = next(kernels)
        phase = ranges[-open_[0][1]].phase if open_ else OTHER
        if until != float("inf"):
            host[phase] += until - moment
        while kernel is not None and kernel.begin_us < until:
            device[phase] += kernel.device_us
            kernel = next(kernels)
    while kernel is not None:  # where there are no ranges
        device[OTHER] += kernel.device_us
        kernel = next(kernels)
    host[OTHER] = max(0.0, wall_us - sum(us for name, us in host.items() if name != OTHER))
    names = [name for name in (*PHASES, OTHER) if host[name] or device[name]]
    return _rows(names, host, device, calls, all_host=wall_us, num_steps=num_steps)


def operations(events: Iterable[Event], *, num_steps: int) -> list[ProfileRow]:
    """The ten that take most by themselves: of the device where it has worked, else of the host."""
    host, device, calls = defaultdict[str, float](float), defaultdict[str, float](float), defaultdict[str, int](int)
    for event in events:
        if not event.phase:
            host[event.name] += event.self_us
            device[event.name] += event.device_us
            calls[event.name] += 1
    decides = device if sum(device.values()) else host
    largest = heapq.nlargest(LARGEST, (name for name in host if decides[name]), key=lambda name: decides[name])
    return _rows(largest, host, device, calls, all_host=sum(host.values()), num_steps=num_steps)


def _rows(
    names: Iterable[str],
    host: defaultdict[str, float],
    device: defaultdict[str, float],
    calls: defaultdict[str, int],
    *,
    all_host: float,
    num_steps: int,
) -> list[ProfileRow]:
    """From microseconds and calls in all steps."""
    all_device = sum(device.values())
    return [
        ProfileRow(
            name=name,
            host_ms=host[name] / 1e3 / num_steps,
            host_share=host[name] / all_host if all_host else 0.0,
            device_ms=device[name] / 1e3 / num_steps,
            device_share=device[name] / all_device if all_device else 0.0,
            calls=calls[name] / num_steps,
        )
        for name in names
    ]


def lines(title: str, rows: Sequence[ProfileRow]) -> list[str]:
    """As a table of text."""
    has_device = any(row.device_ms for row in rows)
    head = f"{title:40} {'calls':>8} {'host ms':>10} {'':>6}" + (f" {'device ms':>10}" if has_device else "")
    found = [head.rstrip()]
    for row in rows:
        text = f"{row.name[:40]:40} {row.calls:8.4g} {row.host_ms:10.3f} {row.host_share:6.1%}"
        found.append(text + (f" {row.device_ms:10.3f} {row.device_share:6.1%}" if has_device else ""))
    return found
