"""Commands as a user types them, and every process that comes of them, found by a mark in its environment."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestration import child_process
from orchestration.operations.drill.evidence import Lost
from pipeline.provenance import COMMAND
from pipeline.supervision import planned_faults
from pipeline.supervision.planned_faults import Fault

MARK = "NORMFREE_DRILL"
POLL_S = 0.1
END_S = 1800.0
"""A command that has not ended by then has got stuck; a machine that is busy with other things is slow."""
UNSET = (
    "MLFLOW_TRACKING_URI",
    "NORMFREE_TRACKING_URI",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NORMFREE_RANKS_STORE",
)


@dataclass
class Start:
    """One start of a command."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """What it has written so far to standard output and error."""
        return self.log.read_text(errors="replace")

    def last_words(self) -> str:
        """Its last sentence on standard error, or its last line."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        said = [line.removeprefix("normfree: ") for line in lines if line.startswith("normfree: ")]
        return (said or lines or [""])[-1]

    def wait(self) -> int:
        """Its exit code, minus the signal's number where one ended it."""
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise Lost(f"it had not ended after {END_S:.0f} s: {self.last_words()}") from None


class Group:
    """All commands of one scenario, and what they leave."""

    def __init__(self, mark: str, folder: Path) -> None:
        self.mark, self.folder = mark, folder
        self.cache = folder / "cache"
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)
        self._num = 0

    def start(
        self,
        words: Sequence[str],
        *,
        module: str = "normfree",
        host: str = "",
        faults: Sequence[Fault] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Start:
        """Starts `normfree WORDS`, or another program of ours, which meets the faults.

        Args:
            host: stands for a host of its own, which `kill_host` takes away.
        """
        self._num += 1
        log = self.folder / f"start-{self._num}.log"
        own = {
            **dict.fromkeys(UNSET, ""),
            MARK: self.mark + host,
            COMMAND: shlex.join(["normfree", *words]),
            "NORMFREE_CACHE": str(self.cache),
            "NORMFREE_PICTURES": "0",  # the last thing that matters here, and slow
            "TMPDIR": str(self._temporary),
            planned_faults.VARIABLE: json.dumps([asdict(fault) for fault in faults]) if faults else "",
            **(environment or {}),
        }
        with log.open("wb") as output:
            process = child_process.start(
                module, list(words), environment=own, folder=self.folder, own_session=True, output=output
            )
        return Start(process, log)

    def kill(self) -> int:
        """SIGKILL to all of them; how many there were at first."""
        return kill_marked(self.mark)

    def kill_host(self, host: str) -> int:
        """SIGKILL to all of one host; how many there were."""
        return kill_marked(self.mark + host)

    def wait_until_gone(self, limit_s: float) -> list[str]:
        """What still runs after `limit_s`, as its command line."""
        end_s = time.monotonic() + limit_s
        while pids := _marked(self.mark):
            if time.monotonic() > end_s:
                return [_command_line(pid) for pid in pids]
            time.sleep(POLL_S)
        return []


@dataclass(frozen=True)
class Hold:
    """A place at which a rank stands still until it is told to go on, or is not any more."""

    file: Path
    fault: Fault

    def pid(self, start: Start) -> int:
        """Of the rank, once it stands there. Lost if the command ends before."""
        end_s = time.monotonic() + END_S
        while True:
            with contextlib.suppress(FileNotFoundError):
                text = self.file.read_text()
                if text.endswith("\n"):
                    return int(text)
            if start.process.poll() is not None or time.monotonic() > end_s:
                code = start.process.poll()
                raise Lost(f"it ended with {code} before the fault could happen: {start.last_words()}")
            time.sleep(POLL_S / 4)

    def go(self) -> None:
        self.file.with_name(self.file.name + planned_faults.GO).touch()


def kill_marked(mark: str) -> int:
    """SIGKILL to every process whose mark begins so, again until none is left; how many there were at first."""
    first = pids = _marked(mark)
    while pids:
        for pid in pids:
            send(pid, signal.SIGKILL)
        time.sleep(POLL_S)
        pids = _marked(mark)
    return len(first)


def _marked(mark: str) -> list[int]:
    """Numbers of this user's processes whose mark begins so."""
    return child_process.processes_with(f"{MARK}={mark}")


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return f"process {pid}"
