"""What `normfree launch` takes: (name, type, what its value is called, help), by the heading of its help; and where it counts."""

import sys
from collections.abc import Mapping

from pipeline.errors import UserError

OPTIONS: dict[str, list[tuple[str, type, str, str]]] = {
    "how many": [
        ("--nodes", int, "N", "of a Slurm or Kubernetes job"),
        ("--processes-per-host", int, "N", "ranks; default: slots, --gpus-per-host, else 1"),
        ("--gpus-per-host", int, "N", "that Slurm or Kubernetes is asked for"),
        ("--min-hosts", int, "M", "start, and go on, with so many (default: start with all, go on with 1)"),
        ("--max-restarts", int, "N", "of the run within an hour (default %(default)s)"),
    ],
    "over ssh": [
        ("--python", str, "PATH", "the interpreter there (default: this one)"),
        ("--ssh-option", list, "NAME=VALUE", "as ssh -o takes it; goes before ours"),
        ("--interface", str, "NAME", "network between the hosts (default: the one that ssh reaches)"),
        ("--store-address", str, "ADDRESS", "this machine's, as hosts see it (default: as ssh comes)"),
        ("--store-port", int, "PORT", "that hosts reach here (default: a free one)"),
    ],
    "Slurm and Kubernetes": [
        ("--job-name", str, "NAME", "in the cluster (default: the run's)"),
        ("--partition", str, "NAME", "of Slurm"),
        ("--account", str, "NAME", "of Slurm"),
        ("--time", str, "LIMIT", "of Slurm, as 1-12:00:00; ranks save ahead of it and the job is queued again"),
        ("--slurm-option", list, "NAME=VALUE", "an option of sbatch, as constraint=h100"),
        ("--cpus-per-host", str, "N", "that Slurm or Kubernetes is asked for"),
        ("--image", str, "IMAGE", "of Kubernetes: a container image that has normfree"),
        ("--memory", str, "SIZE", "of a pod, as 64Gi"),
        ("--secret", str, "NAME", "a Secret whose keys are the variables' names (default %(default)s)"),
        ("--claim", str, "NAME:/PATH", "a PersistentVolumeClaim that all pods mount"),
        ("--spot", bool, "", "pods may run on nodes that can be taken away"),
    ],
}
DEFAULTS: dict[str, str | int] = {
    "--max-restarts": 10,
    "--python": sys.executable,
    "--interface": "",
    "--store-address": "",
    "--store-port": 0,
    "--secret": "normfree",
}
_RUN = ("--hosts", "--slurm", "--kubernetes", "--torchrun")
_USED_BY: dict[str, tuple[str, ...]] = {
    "--nodes": ("--slurm", "--kubernetes"),
    "--processes-per-host": _RUN,
    "--min-hosts": _RUN,
    "--max-restarts": _RUN,
    "--profile": _RUN,
    "--tracking-uri": _RUN,
    "--python": ("--hosts", "--slurm"),
    "--ssh-option": ("--hosts",),
    "--interface": ("--hosts",),
    "--store-address": ("--hosts",),
    "--store-port": ("--hosts", "--torchrun"),
    "--job-name": ("--slurm", "--kubernetes"),
    "--partition": ("--slurm",),
    "--account": ("--slurm",),
    "--time": ("--slurm",),
    "--slurm-option": ("--slurm",),
    "--cpus-per-host": ("--slurm", "--kubernetes"),
    "--image": ("--kubernetes",),
    "--memory": ("--kubernetes",),
    "--secret": ("--kubernetes",),
    "--claim": ("--kubernetes",),
    "--spot": ("--kubernetes",),
    "--env": ("--hosts", "--slurm", "--kubernetes"),
    "--gpus-per-host": _RUN,
}
"""Where an option counts: elsewhere it would be taken and do nothing."""


def check_used(given: Mapping[str, object], where: str, *, is_sweep: bool) -> None:
    """UserError for an option that nothing reads there.

    Args:
        given: values of the options of `launch`, by name.
        where: --hosts (a hostfile too), --slurm, --kubernetes, --torchrun or --ray.
    """
    for name, users in _USED_BY.items():
        if given[name] in (DEFAULTS.get(name), None, [], False):
            continue
        if is_sweep and users == _RUN and name != "--gpus-per-host":
            raise UserError(
                f"{name} says nothing to a sweep; leave it out, or give it after -- if 'normfree transfer' has it"
            )
        if where not in users:
            raise UserError(f"{name} is for {' and '.join(users)}, and does nothing with {where}; leave it out")
