"""The agent of one host of a job: a process that starts, watches and restarts this host's ranks (`supervisor`).

    python -P -m orchestration.launch.agent FILE.json|-       the document: `Host`; `-`: on standard input

`normfree launch` starts one on each host, and the store (`orchestration.launch.store`) outside of them. Secrets and the
tracker's URI come by the environment. The exit code is the job's: 0 finished, 2 the user's mistake, 75 stopped and saved, 76 a
rank froze and there is no restart left, 1 anything else; or this host's: 69 it is cut off from the job, which may go on.
"""

import argparse
import dataclasses
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestration.launch.rank_processes import Ranks
from orchestration.run.rank_end import EXIT_USER
from pipeline import documents
from pipeline.documents import Positive, Text
from pipeline.errors import UserError, place_trouble
from pipeline.supervision.process_exit import run as run_process
from pipeline.supervision.stop_signals import say

if TYPE_CHECKING:
    from pipeline.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Host:
    """The document."""

    run: Text
    """The Run, as YAML."""
    out: Text
    run_id: Text
    """Of the launch: equal on all its hosts, and no other launch's."""
    store: Text
    """HOST:PORT, as every host reaches it."""
    host_name: Text = ""
    """As people know this host; no other host's. "": its own name, where one document is for all hosts."""
    min_hosts: Positive = 1
    max_hosts: Positive = 1
    processes: Positive = 1
    """On this host, and on each other one."""
    max_restarts: documents.Count = 3
    restart_window_s: float = 3600.0
    join_timeout_s: float = 600.0
    """So long an agent waits until `min_hosts` are there."""
    interface: Text | None = None
    """Network interface of the ranks' own connections; None: the one by which the store is reached."""
    command: Text = ""
    """What people typed."""
    debug: bool = False


def main() -> int:
    parser = argparse.ArgumentParser(description="the agent of one host (started by 'normfree launch')")
    parser.add_argument("document")
    args = parser.parse_args()
    try:
        host = _read(args.document)
        return supervise(host)
    except UserError as error:
        say(str(error))
        return EXIT_USER
    except OSError as error:
        if (trouble := place_trouble(error)) is None:
            raise
        say(trouble)
        return EXIT_USER


def _read(name: str) -> Host:
    if name == "-":
        data = sys.stdin.buffer.read(documents.MAX_BYTES + 1)
        return documents.convert(documents.parse_json(data, "the agent's document"), Host, "the agent's document")
    return documents.read(name, Host)


def supervise(host: Host) -> int:
    """This host's part of the job, to the job's exit code. Raises UserError for what the document has wrong."""
    from orchestration.launch import host_address, supervisor
    from orchestration.launch.attempts import Hosts
    from orchestration.launch.restart_policy import RestartLimits
    from pipeline.training.run import load_yaml

    run = load_yaml(host.run, "the run in the agent's document")
    if host.min_hosts > host.max_hosts:
        raise UserError(f"min_hosts {host.min_hosts} is more than max_hosts {host.max_hosts}; set it to that or less")
    run = planned(run, host.max_hosts * host.processes)
    store, port = _place(host.store)
    address = host_address.address_of(host.interface) if host.interface else host_address.own_address(store, port)
    hosts = Hosts(
        run_id=host.run_id,
        host=host.host_name or socket.gethostname(),
        address=address,
        store=(store, port),
        min_hosts=host.min_hosts,
        max_hosts=host.max_hosts,
        join_s=host.join_timeout_s,
        limits=RestartLimits(max_restarts=host.max_restarts, window_s=host.restart_window_s, min_hosts=host.min_hosts),
    )
    network = _network(host, address)
    ranks = ranks_of(run, host.out, host.command, network, processes=host.processes, debug=host.debug)
    return supervisor.supervise(ranks, hosts)


def planned(run: "Run", num_ranks: int) -> "Run":
    """With the micro-batch of so many ranks. Raises UserError for what does not fit together.

    Where hosts are lost, the ranks that are left take more micro-batches a step and no larger ones: larger ones may not fit into
    their memory, and sums of the same parts give the same weights but for rounding.
    """
    from pipeline.data.format import manifest
    from pipeline.storage import objects
    from pipeline.training.check_run import check_run

    if not run.data.url:
        raise UserError("the run has no data: set --data.url to a folder that 'normfree data prepare' wrote")
    check_run(run, num_ranks=num_ranks, read_data=objects.exists(objects.join(run.data.url, manifest.NAME)))
    if run.micro_batch == "auto":  # found again on as many ranks as are left
        return run
    return dataclasses.replace(run, micro_batch=run.batch_plan(num_ranks)[0])


def ranks_of(
    run: "Run", out: str, command: str, environment: Mapping[str, str], *, processes: int, debug: bool
) -> Ranks:
    """The ranks of a run on this host. They hear of it by the environment: neither the run, nor a command or a tracker's URI
    with a password, is for everybody to read."""
    from orchestration.run.worker import RUN
    from pipeline.provenance import COMMAND
    from pipeline.training.run import dump_yaml

    return Ranks(
        module="orchestration.run.worker",
        arguments=(out, "--debug") if debug else (out,),
        environment={RUN: dump_yaml(run), COMMAND: command, **environment},
        processes=processes,
        grace_s=run.watchdog.grace_s,
    )


def _network(host: Host, address: str) -> dict[str, str]:
    from orchestration.launch import host_address

    name = host.interface or host_address.interface_of(address)
    # What the user has set for the cluster goes first.
    return {key: os.environ.get(key) or name for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name}


def _place(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"store {text!r} in the agent's document is no HOST:PORT; write it as 10.0.0.1:29400")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    run_process(main)
