"""The store through which the hosts of a launch find each other, as a process of the launcher's."""

import re
import subprocess
from collections import Counter
from collections.abc import Sequence

from orchestration import child_process
from orchestration.clusters.remote import Ready
from pipeline.errors import UserError


def address_for(found: Sequence[Ready]) -> str:
    """This machine's address as most hosts see it; the loopback's where all of them are this machine."""
    seen = Counter(r.launcher for r in found if r.launcher and not is_loopback(r.launcher))
    return seen.most_common(1)[0][0] if seen else "127.0.0.1"


def start_store(address: str, port: int) -> "tuple[subprocess.Popen[bytes], str]":
    """The process through which the hosts find each other, and its host:port. UserError: the port is in use, or not ours."""
    process = child_process.start("orchestration.launch.store", [address, str(port)], pipe_output=True)
    assert process.stdout is not None
    line = process.stdout.readline().decode("utf-8", "replace")
    found = re.fullmatch(r"\S+ (\d{1,5})\n", line)
    if not found:
        process.kill()
        rest = (line + process.stdout.read().decode("utf-8", "replace")).strip()
        raise UserError(rest.removeprefix("normfree: ") or f"no store could be started at {address}:{port}")
    host = f"[{address}]" if ":" in address else address
    return process, f"{host}:{found[1]}"


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"
