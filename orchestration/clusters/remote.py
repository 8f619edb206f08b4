"""What runs on a host on behalf of `normfree launch`, at the other end of one ssh: starts the host's agent and ends it.

    standard input     one JSON object a line: {"start": Start}, then {"beat": true}, {"signal": 15}
    standard output    one JSON object a line, in "normfree": {"ready": Ready}, {"line": text of the agent}, {"ended": code}

Secrets come this way and stand on no command line. When standard input ends or falls silent, ssh, the launcher or the network
is gone: the agent is ended, its ranks save and leave. Nothing of them outlives this process, and another process of the same run
on this host, which an earlier connection left behind, is waited for: there is never a second set of ranks.
"""

import contextlib
import hashlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from orchestration import child_process
from orchestration.launch import host_address
from orchestration.run.rank_end import EXIT_USER
from orchestration.spool.process_lock import only_one
from pipeline import documents, places
from pipeline.errors import UserError, place_trouble
from pipeline.secrets import public
from pipeline.supervision import process_exit

MARK = "normfree"
BEAT_S = 5.0
SILENT_S = 60.0
"""Without a line from the launcher for this long, it is gone. ssh gives up after the same time."""
MARGIN_S = 10.0
REACH_S = 20.0
MAX_LINE_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What the launcher compares before anything starts."""

    host: str
    """Its own name."""
    versions: str
    """Of Python and of the libraries that decide numbers."""
    revision: str
    address: str = ""
    """Under which the launcher reached it."""
    interface: str = ""
    """Of that address."""
    launcher: str = ""
    """Address of the launcher as this host sees it."""
    num_gpus: int = 0
    machine: str = ""
    """One, however many names it has."""
    clock_s: float = 0.0
    """Unix time."""


@dataclass(frozen=True, kw_only=True)
class Start:
    folder: str
    environment: dict[str, str]
    store: str
    """host:port"""
    grace_s: float
    document: dict[str, Any] = field(default_factory=dict)
    """For `orchestration.launch.agent`."""


def main() -> int:
    child_process.adopt_orphans()
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    try:
        _say({"ready": asdict(_ready())})
        start = _first(lines)
        return _run(start, lines) if start else 0
    except UserError as error:
        _say({"refused": str(error)})
    except OSError as error:  # its disk is full, or not to be written
        if (trouble := place_trouble(error)) is None:
            raise
        _say({"refused": trouble})
    return EXIT_USER


def _read(lines: "queue.Queue[bytes | None]") -> None:
    while line := sys.stdin.buffer.readline(MAX_LINE_BYTES):
        lines.put(line)
    lines.put(None)


def _say(what: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({MARK: what}), flush=True)


def _ready() -> Ready:
    from pipeline import provenance
    from pipeline.storage.process_identity import this_process

    facts, reached = provenance.facts(), host_address.over_ssh()
    return Ready(
        host=socket.gethostname(),
        versions=f"python {facts['environment.python']}, {facts['environment.libraries']}",
        revision=facts.get("code.revision", ""),
        address=reached.address,
        interface=reached.interface,
        launcher=reached.by,
        num_gpus=host_address.num_gpus(),
        machine=this_process().machine,
        clock_s=time.time(),
    )


def _first(lines: "queue.Queue[bytes | None]") -> Start | None:
    """What to start; None = the launcher wants nothing of this host, or is gone."""
    while True:
        try:
            line = lines.get(timeout=SILENT_S)
        except queue.Empty:
            return None
        if line is None:
            return None
        said = documents.parse_json(line, "what the launcher says")
        if "start" in said:
            return documents.convert(said["start"], Start, "what the launcher says")


def _run(start: Start, lines: "queue.Queue[bytes | None]") -> int:
    os.environ.update(start.environment)
    try:
        os.chdir(start.folder)
    except OSError as error:
        raise UserError(
            f"it has no folder {start.folder} ({error.strerror}); share the folder, or start in one that all hosts have"
        ) from None
    for name in child_process.FILES:
        path = start.environment.get(name)
        if path and not os.path.exists(path):
            raise UserError(f"{name} names {path}, which it does not have; put the file there, or unset the variable")
    _reach(start.store)
    with contextlib.ExitStack() as stack:
        lock, out = places.private_folder("launch") / f"{_name(start)}.lock", public(start.document["out"])
        wait_s = SILENT_S + start.grace_s + 2 * MARGIN_S
        if not stack.enter_context(only_one(lock, lambda: False, wait_s=MARGIN_S)):
            _say(
                {
                    "line": f"normfree: another launch of {out} is on this host; waiting for its end, {wait_s:.0f} s at most"
                }
            )
            if not stack.enter_context(only_one(lock, lambda: False, wait_s=wait_s - MARGIN_S)):
                raise UserError(f"another launch of {out} runs on it; end that one, or give another --out")
        folder = stack.enter_context(places.temporary_folder("launch"))
        (folder / "job.json").write_text(json.dumps(start.document))
        code = _supervise(str(folder / "job.json"), start, lines)
    _say({"ended": code})
    return code if code >= 0 else 128 - code


def _reach(store: str) -> None:
    host, _, port = store.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise UserError(
            f"it does not reach {store}, where the hosts find each other ({error}); open that port to it, or give another with "
            "--store-address and --store-port"
        ) from None


def _name(start: Start) -> str:
    """Homes may be shared by all hosts."""
    key = f"{socket.gethostname()} {start.document.get('out')} {start.folder}"
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def _supervise(job: str, start: Start, lines: "queue.Queue[bytes | None]") -> int:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as output:
        agent = child_process.start(
            "orchestration.launch.agent",
            [job],
            folder=Path(start.folder),
            environment=start.environment,
            on_parent_death=signal.SIGTERM,
            own_session=True,
            output=output,
        )
    pump = threading.Thread(target=_pump, args=(os.fdopen(reading, "rb"),), daemon=True)
    pump.start()
    heard_s, asked_s = time.monotonic(), float("inf")
    while agent.poll() is None:
        now_s = time.monotonic()
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            line = b""
        if line:
            heard_s = now_s
            if "signal" in documents.parse_json(line, "what the launcher says"):
                agent.send_signal(signal.SIGTERM)
                asked_s = min(asked_s, now_s)
        # Not SIGTERM where this host alone is cut off: to the agent that means all hosts, and its ranks get one from Linux.
        if line is None or now_s - heard_s > SILENT_S or now_s - asked_s > start.grace_s + MARGIN_S:
            agent.kill()
            agent.wait()
    _end_orphans(MARGIN_S + (start.grace_s if agent.returncode < 0 else 0.0))
    pump.join(MARGIN_S)
    return agent.returncode


def _end_orphans(wait_s: float) -> None:
    """The ranks that an agent has left behind may save; then they are killed."""
    deadline_s = time.monotonic() + wait_s
    while orphans := psutil.Process().children(recursive=True):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline_s:
            for orphan in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
        time.sleep(0.1)


def _pump(stream: IO[bytes]) -> None:
    with stream:
        while line := stream.readline(1 << 16):
            _say({"line": line.decode("utf-8", "replace").rstrip("\r\n")})


if __name__ == "__main__":
    try:
        ended = main()
    except Exception:
        traceback.print_exc()
        ended = 1
    process_exit.end(ended)  # a thread still reads, with which Python's own end aborts
