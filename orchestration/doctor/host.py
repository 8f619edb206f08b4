"""One host of an examination: answers requests, one JSON document a line on standard input, one on standard output.

    {"do": "hello"}                                               Hello
    {"do": "examine", "num_hosts": 2, "num_ranks": 16, ...}       Examined: software, limits, devices, places, engine
    {"do": "listen", "token": ...}, {"do": "link", ...}           a port; a Link to another host's
    {"do": "mark", ...}, {"do": "sweep", ...}

`python -P -m orchestration.doctor.host -` is started on each host, over ssh or as a child; it ends with its standard input.
What a request carries (tracker, credentials) stands on no command line.
"""

import dataclasses
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestration.doctor import devices, machine, network, storage_checks, sweep
from orchestration.doctor.messages import MARK, MAX_BYTES, Examined, Finding, Hello, words
from orchestration.launch import host_address
from pipeline import documents, places
from pipeline.documents import Count, Text
from pipeline.errors import UserError
from pipeline.storage import objects


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    do: Text
    num_hosts: Count = 1
    num_ranks: Count = 1
    out: Text = ""
    data: Text = ""
    tracking_uri: Text = ""
    parity: bool = True
    token: Text = ""
    address: Text = ""
    port: Count = 0
    names: list[Text] = dataclasses.field(default_factory=list)
    """mark: "write", "remove" or "look", this host's name, and to look for: those of all hosts."""
    environment: dict[Text, Text] = dataclasses.field(default_factory=dict)
    """hello: variables that ranks on this host would have;"""
    folder: Text = ""
    """and where relative paths begin."""
    first_rank: Count = 0
    num_local: Count = 1


class Host:
    """What one host keeps between requests."""

    def __init__(self) -> None:
        self._listener: network.Listener | None = None

    def answer(self, request: Request) -> dict[str, Any]:
        """Plain containers. UserError for a request that is none."""
        asked: dict[str, Callable[[Request], Any]] = {
            "hello": self._hello,
            "examine": examine,
            "listen": self._listen,
            "link": lambda r: network.measure(r.address, r.port, r.token),
            "mark": self._mark,
            "sweep": self._sweep,
        }
        if request.do not in asked:
            raise UserError(
                f"the doctor asks for {request.do!r}, which this host does not know; install the same normfree"
            )
        found = asked[request.do](request)
        return found if isinstance(found, dict) else dataclasses.asdict(found)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _hello(self, request: Request) -> Hello:
        os.environ.update(request.environment)
        if request.folder:
            try:
                os.chdir(request.folder)
            except OSError as error:
                raise UserError(
                    f"it has no folder {request.folder} ({error.strerror}); start in a folder that all hosts have"
                ) from None
        reached = host_address.over_ssh()
        return Hello(
            clock_s=time.time(),
            address=reached.address,
            interface=reached.interface,
            num_gpus=host_address.num_gpus(),
        )

    def _listen(self, request: Request) -> dict[str, Any]:
        self.close()
        self._listener = network.Listener(request.address, request.token)
        return {"port": self._listener.port, "free_port": _free_port(request.address)}

    def _mark(self, request: Request) -> dict[str, Any]:
        place, (doing, name, *all_names) = storage_checks.SharedPlace(request.out, request.token), request.names
        missing: list[str] = []
        if doing == "write":
            place.write(name)
        elif doing == "look":
            missing = place.missing(all_names)
        else:
            place.remove(name)
        return {"missing": missing}

    def _sweep(self, request: Request) -> Any:
        return sweep.run(
            address=request.address,
            port=request.port,
            first_rank=request.first_rank,
            num_local=request.num_local,
            num_ranks=request.num_ranks,
            interface=request.names[0] if request.names else "",
        )


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as found:
        return int(found.getsockname()[1])


def examine(request: Request) -> Examined:
    """All that concerns this host alone. A step that fails is a finding, and the others follow."""
    steps: dict[str, Callable[[], Examined]] = {
        "software": machine.software,
        "limits": lambda: machine.limits(request.num_ranks),
        "memory": machine.memory,
        "name": lambda: machine.names(request.num_hosts),
        "devices": devices.examine,
        "temporary folder": lambda: storage_checks.disk(Path(tempfile.gettempdir()), "temporary folder"),
        "caches": lambda: storage_checks.disk(places.cache_folder(), "caches"),
    }
    if request.out:
        is_local = objects.is_local(request.out)
        steps["--out"] = (
            (lambda: storage_checks.disk(objects.local_path(request.out), "--out"))
            if is_local
            else lambda: storage_checks.bucket(request.out)
        )
    if request.data:
        steps["--data"] = lambda: storage_checks.dataset(request.data)
    if request.tracking_uri:
        steps["tracker"] = lambda: storage_checks.tracker(request.tracking_uri)
    if request.parity:
        steps["engine"] = engine
    facts, findings = dict[str, str](), list[Finding]()
    for name, step in steps.items():
        found = _safely(name, step)
        facts |= found.facts
        findings += found.findings
    return Examined(facts=facts, findings=findings)


def _safely(name: str, step: Callable[[], Examined]) -> Examined:
    try:
        return step()
    except Exception as error:
        remedy = "" if isinstance(error, UserError) else "this could not be examined; look at the host"
        return Examined(findings=[Finding(what=name, value=words(error), remedy=remedy)])


def engine() -> Examined:
    """The engine computes here what plain PyTorch computes (`pipeline.engine.parity_check`), in a process that is alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    from pipeline import distributed
    from pipeline.engine import parity_check
    from pipeline.engine.deepspeed_engine import EngineConfig

    me = distributed.join()
    try:
        worst = parity_check.check(EngineConfig(), world=me, accumulation=1)
    finally:
        distributed.leave()
    return Examined(facts={"engine": f"agrees with plain PyTorch (to {worst:.0e} of a change)"})


def main() -> int:
    """Answers until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    host = Host()
    try:
        while line := sys.stdin.buffer.readline(MAX_BYTES):
            answer = _answer(host, line)
            print(json.dumps({MARK: answer}), file=answers, flush=True)
    finally:
        host.close()
    return 0


def _answer(host: Host, line: bytes) -> Mapping[str, Any]:
    try:
        request = documents.convert(documents.parse_json(line, "what the doctor asks"), Request, "what the doctor asks")
        return {"found": host.answer(request)}
    except Exception as error:
        return {"failed": words(error)}


if __name__ == "__main__":
    from pipeline.supervision.process_exit import end

    end(main())
