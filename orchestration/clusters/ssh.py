"""One ssh to a host: how it is typed, what comes over it, why it ended.

It starts `orchestration.clusters.remote` there. The user's own ssh configuration and --ssh-option win over what is set here; no
pdsh is needed.
"""

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestration.child_process import IS_CHECKOUT, ROOT
from orchestration.clusters.hosts import Host
from orchestration.clusters.remote import MARK, SILENT_S, Ready
from pipeline import documents
from pipeline.errors import UserError

REMOTE = "orchestration.clusters.remote"
CONNECT_S = 10
MAX_LINE_BYTES = 1 << 20

_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9]*[= ][^\x00-\x1f\x7f]+")
_REFUSED = re.compile(r"Permission denied \(|Too many authentication failures")
"""ssh's own words, and not those of a file over there."""
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")


@dataclass(frozen=True, kw_only=True)
class Options:
    python: str = sys.executable
    """The interpreter on every host."""
    folder: str = field(default_factory=os.getcwd)
    """Where the run's relative paths begin, on every host."""
    ssh_options: tuple[str, ...] = ()
    """As `ssh -o` takes them."""
    interface: str = ""
    """Of the network between the hosts; "" = that of the address by which ssh reaches each."""
    store_address: str = ""
    """Of this machine, as the hosts see it; "" = what they see of ssh."""
    store_port: int = 0
    """0 = a free one."""
    max_failures: int = 3
    """A host that is lost more often than this is left out."""

    def check(self) -> None:
        """UserError for what ssh would take for something else, or could not use."""
        for option in self.ssh_options:
            if not _OPTION.fullmatch(option):
                raise UserError(f"--ssh-option {option[:80]!r}: give NAME=VALUE, as 'man ssh_config' spells it")
        if not os.path.isabs(self.python):
            raise UserError(
                f"--python is {self.python}; give the whole path of the interpreter, the same on every host"
            )
        if not 0 <= self.store_port <= 65535:
            raise UserError(f"--store-port is {self.store_port}; give 1 to 65535, or 0 for a free one")
        if self.interface and not _INTERFACE.fullmatch(self.interface):
            raise UserError(
                f"--interface {self.interface[:60]!r} is no name of a network interface; 'ip -br link' lists them"
            )
        if shutil.which("ssh") is None:
            raise UserError("there is no ssh on this machine; install openssh-client")


@dataclass(kw_only=True)
class Connection:
    """One ssh to a host: its process, and what it has said."""

    host: Host
    process: asyncio.subprocess.Process
    ready: Ready | None = None
    ahead_s: float = 0.0
    """Of this machine's clock; what came late over the network makes it less."""
    refused: str = ""
    ended: int | None = None
    """Code of the agent; negative: it was killed."""
    errors: list[str] = field(default_factory=list)
    """Last lines of ssh itself, or of a Python that did not start."""
    reading: "asyncio.Task[None]" = field(init=False)
    """Done when ssh has ended and all it said has been read."""

    def send(self, what: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


def command(host: Host, options: Options, module: str = REMOTE) -> list[str]:
    """The words of one ssh that starts a module of ours there. Nothing in them is secret."""
    words = ["ssh", "-T"]
    for option in options.ssh_options:
        words += ["-o", option]
    ours = (
        "BatchMode=yes",
        f"ConnectTimeout={CONNECT_S}",
        "ServerAliveInterval=10",
        f"ServerAliveCountMax={int(SILENT_S / 10)}",
    )
    for option in ours:
        words += ["-o", option]
    return [*words, "--", host.name, remote_command(options.python, module)]


def remote_command(python: str, module: str = REMOTE) -> str:
    """For the login shell of the host, whichever that is."""
    words = ["exec", "env", "PYTHONSAFEPATH=1"]
    if IS_CHECKOUT:
        words.append(f"PYTHONPATH={ROOT}")
    return shlex.join([*words, python, "-m", module])


async def connect(host: Host, options: Options, show: Callable[[Host, str], None]) -> Connection:
    """Starts ssh, and reads what comes until it ends."""
    process = await asyncio.create_subprocess_exec(
        *command(host, options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the launcher alone
        limit=MAX_LINE_BYTES,
    )
    connection = Connection(host=host, process=process)
    connection.reading = asyncio.create_task(_listen(connection, show))
    return connection


async def _listen(connection: Connection, show: Callable[[Host, str], None]) -> None:
    process = connection.process
    assert process.stdout is not None and process.stderr is not None

    async def errors() -> None:
        async for line in _lines(process.stderr):
            connection.errors = [*connection.errors, line][-20:]
            if connection.ready:
                show(connection.host, line)

    reading = asyncio.create_task(errors())
    async for line in _lines(process.stdout):
        said = _message(line)
        if said is None:  # a login shell's greeting
            show(connection.host, line)
        elif "line" in said:
            show(connection.host, said["line"])
        elif "ready" in said:
            try:
                connection.ready = documents.convert(said["ready"], Ready, f"what {connection.host.label} says")
                connection.ahead_s = connection.ready.clock_s - time.time()
            except UserError:
                connection.refused = "it answers as another version of normfree does; install the same on all hosts"
        elif "refused" in said:
            connection.refused = str(said["refused"])
        elif "ended" in said:
            connection.ended = int(said["ended"])
    await reading
    await process.wait()


async def _lines(stream: asyncio.StreamReader | None) -> AsyncIterator[str]:
    assert stream is not None
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than any of ours
            continue
        if not line:
            return
        yield line.decode("utf-8", "replace").rstrip("\r\n")


def _message(line: str) -> dict[str, Any] | None:
    if not line.startswith(f'{{"{MARK}":'):
        return None
    try:
        found = documents.parse_json(line, "a line of a host")[MARK]
    except UserError:
        return None
    return found if isinstance(found, dict) else None


def why_lost(connection: Connection) -> str:
    """What ended a connection, in words with a remedy."""
    if connection.refused:
        return f"{connection.host.name}: {connection.refused}"
    return why_ended(connection.host.name, connection.process.returncode, connection.errors)


def why_ended(host: str, code: int | None, errors: Sequence[str]) -> str:
    """The same of any ssh, by its code and the last lines of its errors."""
    text, said = " ".join(errors), next((line for line in reversed(errors) if line.strip()), "")
    if "Could not resolve hostname" in text:
        return f"{host}: no such host ({said}); correct the name, or add it to /etc/hosts or ~/.ssh/config"
    if code == 126 or "SyntaxError" in text:
        return f"{host}: its Python cannot run normfree ({said}); give --python the path of one that can, the same on all hosts"
    if _REFUSED.search(text):
        return f"{host} refuses this user's key ({said}); try 'ssh {host} true', and add the key to its authorized_keys"
    if "Host key verification failed" in text or "REMOTE HOST IDENTIFICATION" in text:
        return f"{host}: its host key is not known or has changed; check it, then 'ssh {host} true' once by hand"
    if code == 127 or "No such file or directory" in text:
        return f"{host}: no Python where this machine has it ({said}); install normfree at the same path there, or give --python"
    if "No module named" in text or "ModuleNotFoundError" in text:
        return f"{host}: {said}; install the same normfree there, or give the --python that has it"
    if "command-line" in text:
        return f"{host}: ssh does not take an --ssh-option ({said}); write it as 'man ssh_config' spells it"
    if code == 255 or code is None:
        return f"{host} cannot be reached by ssh ({said or 'it does not answer'}); try 'ssh {host} true'"
    return f"{host}: the process there ended with code {code}{f' ({said})' if said else ''}"


def is_passing(connection: Connection) -> bool:
    """Whether another try may help: the host is down or the network is, and nobody made a mistake."""
    text = " ".join(connection.errors)
    wrong = (
        "Could not resolve",
        "Permission denied",
        "SyntaxError",
        "Host key verification",
        "No such file",
        "No module",
        "IDENTIFICATION",
        "Too many auth",
        "command-line",
    )
    return (
        not connection.refused
        and connection.process.returncode not in (126, 127)
        and not any(part in text for part in wrong)
    )
