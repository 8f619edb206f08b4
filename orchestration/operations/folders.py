"""What a folder or bucket holds: runs and sweeps, found without listing what lies below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from orchestration.operations.run_folder import is_run
from orchestration.operations.status import RunStatus, run_status
from pipeline.errors import UserError
from pipeline.storage import listing, objects

if TYPE_CHECKING:
    from orchestration.operations.sweep_status import SweepStatus

DEPTH = 3
"""Of folders below the given one in which runs are looked for."""
MAX_LOOKED_AT = 2000
"""Folders in all."""
AT_A_TIME = 8

Kind = Literal["run", "sweep", ""]


def kind_of(names: list[str]) -> Kind:
    """By the names in it: a run, a sweep, or a folder of others."""
    if "sweep.json" in names:
        return "sweep"
    return "run" if is_run(names) else ""


def status(url: str, *, verify: bool = False, brief: bool = False) -> RunStatus | SweepStatus | None:
    """Of what the folder holds itself; None where it is neither a run nor a sweep."""
    kind = kind_of([item.name for item in listing.items(url)])
    if kind == "sweep":
        return _sweep(url, brief=brief)
    return run_status(url, verify=verify, brief=brief) if kind == "run" else None


def _sweep(url: str, *, brief: bool) -> SweepStatus:
    from orchestration.operations.sweep_status import sweep_status  # protocols and their libraries come with it

    return sweep_status(url, brief=brief)


def many(
    url: str, *, limit: int, progress: Callable[[str, int, int], None]
) -> tuple[list[RunStatus | SweepStatus | str], bool]:
    """Of the first `limit` runs and sweeps below the folder, by URL, a text for one that cannot be read; whether that is all."""
    found = _find(url, limit, progress)
    places = list(found)
    is_all = len(places) <= limit
    results: list[RunStatus | SweepStatus | str] = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for number, result in enumerate(pool.map(_brief, places[:limit]), 1):
            progress("reading", number, min(len(places), limit))
            results.append(result)
    return results, is_all


def _brief(place: tuple[str, Kind]) -> RunStatus | SweepStatus | str:
    url, kind = place
    try:
        return _sweep(url, brief=True) if kind == "sweep" else run_status(url, brief=True)
    except (UserError, OSError) as error:
        return f"unreadable  {url}: {error}"


def _find(url: str, limit: int, progress: Callable[[str, int, int], None]) -> Iterator[tuple[str, Kind]]:
    """Breadth first, a level at a time; one more than `limit` where there are more."""
    level, num_seen, num_found = [url], 0, 0
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for _ in range(DEPTH + 1):
            below: list[str] = []
            for place, items in zip(level, pool.map(listing.items, level), strict=True):
                num_seen += 1
                progress("looking into folders", num_seen, num_seen)
                kind = kind_of([item.name for item in items])
                if kind:
                    num_found += 1
                    yield place, kind
                    if num_found > limit:
                        return
                elif not any(item.name == "manifest.json" for item in items):  # of a dataset
                    below += [objects.join(place, item.name) for item in items if item.is_folder]
            level = below[: MAX_LOOKED_AT - num_seen]
