"""What `normfree launch` takes: (name, type, what its value is called, help), by the heading of its help."""

import sys

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
