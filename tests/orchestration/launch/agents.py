"""Hosts of a job on one machine: an agent each, by a name of its own, and a store outside of them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestration import child_process
from pipeline.training.run import Run, dump_yaml

ENOUGH_S = 900.0
"""The machine may be slow."""
PROGRAM = """
import os, sys
from orchestration.launch import supervisor
from orchestration.launch.attempts import Hosts
from orchestration.launch.rank_processes import Ranks
from orchestration.launch.restart_policy import RestartLimits
limits = RestartLimits(max_restarts=3, window_s=3600, min_hosts=1)
ranks = Ranks(module="rank_program", processes=1, grace_s=30)
store = ("127.0.0.1", int(sys.argv[2]))
hosts = Hosts(run_id="job", host=sys.argv[1], address="127.0.0.1", store=store, max_hosts=2, limits=limits)
os._exit(supervisor.supervise(ranks, hosts))
"""


def until(condition: Callable[[], Any]) -> Any:
    deadline_s = time.monotonic() + ENOUGH_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    return found


def ranks_of(agent: "subprocess.Popen[Any]") -> list[int]:
    """Process numbers of what the agent has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == agent.pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@contextmanager
def job(folder: Path) -> Iterator["Job"]:
    store = child_process.listening_store("127.0.0.1")
    made = Job(folder, store.port)
    try:
        yield made
    finally:
        for agent in made.agents:
            agent.kill()
            agent.wait()


class Job:
    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.agents: list[subprocess.Popen[Any]] = []

    def start(self, *words: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[Any]":
        path = os.pathsep.join([str(self.folder), str(child_process.ROOT)])
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})}
        with (self.folder / "output").open("ab") as output:
            self.agents.append(subprocess.Popen([sys.executable, *words], env=variables, stderr=output, stdout=output))
        return self.agents[-1]

    def toy(self, host: str) -> "subprocess.Popen[Any]":
        """An agent whose ranks run `rank_program` of the folder."""
        return self.start("-c", PROGRAM, host, str(self.port))

    def agent(self, host: str, run: Run, out: Path, **more: Any) -> "subprocess.Popen[Any]":
        """One as `normfree launch` starts it."""
        document = {"run": dump_yaml(run), "out": str(out), "run_id": "job", "store": f"127.0.0.1:{self.port}"}
        document |= {"host_name": host, "max_hosts": 2, "join_timeout_s": ENOUGH_S, **more}
        path = self.folder / f"{host}.json"
        path.write_text(json.dumps(document))
        return self.start("-m", "orchestration.launch.agent", str(path), environment={"NORMFREE_WAIT_FOR_TRACKER": "0"})

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()
