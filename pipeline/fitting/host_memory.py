"""Main memory that this process may use: the machine's, and what the groups that it is in leave it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOTS = {True: ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
         False: ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
"""By whether the hierarchy is of cgroup v2: its folder, files of limit and use, and what of the use gives way."""


def cgroup_limit_bytes() -> int | None:
    """The least limit of the groups that this process is in; None where there is none, or no such files."""
    return min((limit for limit, _ in _groups()), default=None)


def available_bytes() -> int:
    """Free, or free when asked for; of the machine, or of the group that leaves least."""
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _groups())]))


def _groups() -> Iterator[tuple[int, int]]:
    """(limit, use) of each group with a limit that this process is in."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, group = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            root, limit_name, use_name, gives_way = ROOTS[not kinds]
            folder = Path(root + group)
            for each in (folder, *folder.parents):
                limit = _read(each / limit_name)
                if limit.isdigit() and int(limit) < 1 << 60:
                    stat = dict(line.split() for line in _read(each / "memory.stat").splitlines())
                    yield int(limit), max(0, int(_read(each / use_name) or 0) - int(stat.get(gives_way, 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
