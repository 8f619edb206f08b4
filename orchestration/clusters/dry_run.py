"""What a launch over ssh would do, in words that can be pasted."""

import shlex
from collections.abc import Mapping, Sequence

from orchestration.clusters import ssh
from orchestration.clusters.environment import shown
from orchestration.clusters.hosts import Host
from orchestration.clusters.job import Job


def over_ssh(job: Job, hosts: Sequence[Host], environment: Mapping[str, str], options: ssh.Options) -> list[str]:
    """Lines: the store here, one ssh a host, and what each host gets through it."""
    address = options.store_address or "(this machine's address as the hosts see it)"
    port = str(options.store_port) if options.store_port else "(a free port)"
    document = job.document(
        run_id="(a new one)",
        store=f"{address}:{port}",
        interface=options.interface or "(of the address that ssh reaches)",
    )
    run = str(document.pop("run")).splitlines()
    return [
        f"{job.num_hosts} hosts with {job.processes} ranks each: {job.num_hosts * job.processes} ranks",
        "on this machine, until the run is over:",
        f"  {options.python} -P -m orchestration.launch.store {address} {port}",
        *(f"  {shlex.join(ssh.command(host, options))}" for host in hosts),
        f"each host gets through ssh's standard input, and works in {options.folder}:",
        *(f"  {line}" for line in shown(environment)),
        "its agent, python -P -m orchestration.launch.agent, gets:",
        *(f"  {name}: {value}" for name, value in document.items()),
        *(f"  host_name: {host.label}" for host in hosts),
        "  run:",
        *(f"    {line}" for line in run),
    ]
