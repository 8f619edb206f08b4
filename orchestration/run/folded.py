"""Errors that many ranks meet at once are one line on the console, with their number; each rank's log has its own.

The ranks' log writers on a machine, or on all where the run's folder is a shared disk, agree through a small file with a lock.
Where that does not work a line is shown: rather twice than never.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestration.spool.rank_logs import is_consequence, is_error
from pipeline import places

NAME = "console.json"
SAME_S = 60.0
"""A line is folded into one that another rank said within this time."""
MAX_LINES = 3
"""Of a rank, in all."""
OTHERS_S = 1.0
"""After the end of its own rank, who has shown a line waits this long for others that say the same."""
MAX_BYTES = 1 << 20


class Folded:
    """What one rank other than 0 shows on the console."""

    def __init__(self, folder: Path, rank: int, *, write: Callable[[str], None] | None = None) -> None:
        self._path, self._rank = folder / NAME, rank
        self._write = write or _to_stderr
        self._shown: list[str] = []

    def show(self, text: str) -> None:
        """Shows a line if it is a first error, or a sentence of ours, that no other rank has just shown."""
        if (
            len(self._shown) >= MAX_LINES
            or is_consequence(text)
            or not (is_error(text) or text.startswith("normfree: "))
        ):
            return
        key = hashlib.sha256(re.sub(r"0x[0-9a-f]+|\d+", "#", text).encode()).hexdigest()[:16]
        if key in self._shown:
            return
        is_new = True
        with self._others() as seen:
            if seen is not None:
                row = seen.setdefault(key, {"time_s": time.time(), "ranks": []})
                is_new = not row["ranks"]
                row["ranks"] = sorted({*row["ranks"], self._rank})
        if is_new:
            self._shown.append(key)
            self._write(f"[rank {self._rank}] {text}\n")

    def close(self) -> None:
        """Says how many others said the same."""
        if not self._shown:
            return
        time.sleep(OTHERS_S)
        with self._others() as seen:
            ranks = {rank for key in self._shown for rank in (seen or {}).get(key, {}).get("ranks", ())} - {self._rank}
        if ranks:
            self._write(f"[rank {self._rank}] {len(ranks)} other ranks said the same; 'normfree logs' shows each\n")

    @contextlib.contextmanager
    def _others(self) -> Iterator[dict[str, Any] | None]:
        """What ranks have shown of late, to be added to; None where it cannot be known."""
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(self._path, "a+", encoding="utf-8", opener=places.no_follow))
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                seen = _recent(file.read(MAX_BYTES))
            except (OSError, ValueError):  # ValueError: a UserError, for a link in its place
                yield None
                return
            yield seen
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), 0)
                file.write(json.dumps(seen))


def _recent(text: str) -> dict[str, Any]:
    try:
        rows = json.loads(text)
        return {
            k: r for k, r in rows.items() if time.time() - float(r["time_s"]) < SAME_S and isinstance(r["ranks"], list)
        }
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
