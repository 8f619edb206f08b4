"""What the servers have acknowledged of a run or sweep, as a file that a kill at any moment leaves whole."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline import documents
from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.storage import objects


def read_state(path: Path) -> dict[str, dict[str, Any]]:
    """By server; {} where there is none. A file that is damaged is put aside and reported, and nothing of it is needed: what a
    server has is asked of the server, and a run is found there by its token."""
    try:
        return documents.read(str(path), dict[str, dict[str, Any]])
    except FileNotFoundError:
        return {}
    except UserError as error:
        aside = path.with_name(f"{path.name}.{int(time.time())}.damaged")
        os.replace(path, aside)
        tell(f"{error}; it is {aside.name} now, and the server is asked what it has")
        return {}


def tell(text: str) -> None:
    """A sentence about records on their way to a server, on standard error."""
    print(terminal(f"tracking: {text}"), file=sys.stderr)


class ServerState(dict[str, Any]):
    """What one server has of a run or sweep: its part of `tracking.json`, which holds one for each server."""

    def __init__(self, file: Path, server: str, fresh: dict[str, Any]) -> None:
        """`fresh`: what a server has that is new; the same keys are there for a known one."""
        self.file = file
        self.everywhere: dict[str, dict[str, Any]] = read_state(file)
        super().__init__(fresh | self.everywhere.get(server, {}))
        self.everywhere[server] = self

    def save(self) -> None:
        write_state(self.file, self.everywhere)


def write_state(path: Path, value: dict[str, Any]) -> None:
    """Replaces `path` at once: readers see the old content or the new."""
    objects.write_bytes(path, json.dumps(value, indent=1).encode())
