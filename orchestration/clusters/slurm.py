"""A run as a Slurm job: the script that `sbatch` takes, one task a node, and its submission.

The batch step holds the store through which the agents meet. Ahead of the time limit Slurm signals the tasks, the ranks save,
and the job is queued again; a job that a person cancels is not. Settings of `srun`: a lost node ends neither step nor job.
"""

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

from orchestration.child_process import IS_CHECKOUT, ROOT
from orchestration.clusters.job import Job
from pipeline.errors import UserError
from pipeline.supervision.stop_signals import EXIT_REQUEUE

EARLY_S = 60
"""Slurm may signal this much later or earlier than it is told to."""
MAX_SIGNAL_S = 65535
SLURM_S = 60.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(?:,[A-Za-z0-9][A-Za-z0-9_.+-]*)*")
_TIME = re.compile(r"\d+(?::\d\d){0,2}|\d+-\d+(?::\d\d){0,2}|UNLIMITED")
_OPTION = re.compile(r"[a-z][a-z-]*(?:=[^\x00-\x1f\x7f]*)?")
_KEPT = ("nodes", "ntasks-per-node", "signal", "requeue", "open-mode", "no-kill", "export")
"""What the script relies on."""


@dataclass(frozen=True, kw_only=True)
class Options:
    python: str
    folder: str
    name: str
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    gpus: int | None = None
    """A node."""
    cpus: int | None = None
    """A node."""
    more: tuple[str, ...] = ()
    """NAME=VALUE, as sbatch takes them after --."""


def script(job: Job, options: Options) -> str:
    """The text of the batch script. UserError: an option that cannot be one, or that the script itself sets."""
    lines = [f"#SBATCH --{line}" for line in _directives(job, options)]
    python = shlex.quote(options.python)
    document = job.document(run_id="$run_id", store="$store", host_name="")
    return _SCRIPT.format(
        directives="\n".join(lines),
        folder=shlex.quote(options.folder),
        path=f"export PYTHONPATH={shlex.quote(str(ROOT))}\n" if IS_CHECKOUT else "",
        python=python,
        document=_for_here_document(document),
        requeue=EXIT_REQUEUE,
    )


_SCRIPT = """\
#!/bin/bash
{directives}

cd {folder} || exit 2
export PYTHONSAFEPATH=1
{path}run_id=$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
# Where the nodes find each other: a process of this batch step, at an address that is not the loopback's.
address=$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127[.]/ {{print $1; exit}}')
coproc STORE {{ exec {python} -m orchestration.launch.store "${{address:-$(hostname -I | cut -d' ' -f1)}}" 0; }}
read -r address port <&"${{STORE[0]}}" || exit 1
store=$address:$port
trap 'cancelled=1' TERM  # scancel; the signal ahead of the time limit goes to the tasks alone

# One agent a node. A task that ends does not end the others, and a node that is lost does not end the step.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --no-kill --export=ALL --label \\
  {python} -m orchestration.launch.agent - <<JOB
{document}
JOB
code=$?
kill "$STORE_PID" 2>/dev/null
if [ "$code" = {requeue} ] && [ -z "${{cancelled:-}}" ]; then
  echo "normfree: stopped after saving; the job is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _directives(job: Job, options: Options) -> list[str]:
    signal_s = min(MAX_SIGNAL_S, int(job.run.watchdog.grace_s) + EARLY_S)
    least = job.first_hosts or job.num_hosts
    nodes = str(job.num_hosts) if least == job.num_hosts else f"{least}-{job.num_hosts}"
    found = [f"job-name={options.name}", f"nodes={nodes}", "ntasks-per-node=1"]
    for name, value, pattern in (
        ("partition", options.partition, _NAME),
        ("account", options.account, _NAME),
        ("time", options.time, _TIME),
        ("gpus-per-node", options.gpus, re.compile(r"[1-9]\d*")),
        ("cpus-per-task", options.cpus, re.compile(r"[1-9]\d*")),
    ):
        if value is not None:
            if not pattern.fullmatch(str(value)):
                raise UserError(f"--{name} {str(value)[:60]!r} is nothing that sbatch takes; see 'man sbatch'")
            found.append(f"{name}={value}")
    for option in options.more:
        name = option.removeprefix("--").partition("=")[0]
        if not _OPTION.fullmatch(option.removeprefix("--")):
            raise UserError(
                f"--slurm-option {option[:80]!r}: give NAME=VALUE as 'man sbatch' spells it, without the dashes"
            )
        if name in _KEPT:
            raise UserError(f"--slurm-option {name}: the script sets it, and relies on it; leave it out")
        found.append(option.removeprefix("--"))
    return [
        *found,
        f"signal=TERM@{signal_s}",
        "requeue",
        "open-mode=append",
        "no-kill",
        "export=ALL",
        f"output={options.name}-%j.out",
    ]


def _for_here_document(document: dict[str, object]) -> str:
    """JSON between <<JOB and JOB, where the shell fills in $store and $run_id, and nothing else."""
    text = json.dumps(document, indent=1)
    for character in "\\`$":
        text = text.replace(character, "\\" + character)
    for name in ("store", "run_id"):
        text = text.replace(f'"{name}": "\\${name}"', f'"{name}": "${name}"')
    return text


def submit(text: str, *, has_partition: bool) -> str:
    """Hands the script to sbatch, after it has been asked whether it would take it; what sbatch says.

    Raises:
        UserError: no sbatch on this machine, no partition where the cluster has no default one, or refused.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine; --dry-run prints the script, to be submitted where Slurm is"
        )
    if not has_partition:
        _check_default_partition()
    _slurm(["sbatch", "--test-only"], text)
    return _slurm(["sbatch"], text)


def _check_default_partition() -> None:
    names = _slurm(["sinfo", "--noheader", "--format=%P"]).split()
    if names and not any(name.endswith("*") for name in names):
        raise UserError(
            f"this cluster has no default partition: give --partition, one of {', '.join(dict.fromkeys(names))}"
        )


def _slurm(words: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=SLURM_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"{words[0]} does not answer ({error}); look whether slurmctld runs ('scontrol ping')"
        ) from None
    if done.returncode:
        said = "; ".join(line.partition("error: ")[2] or line for line in done.stderr.strip().splitlines())
        raise UserError(f"Slurm refuses the job: {said}; see 'sinfo' for partitions, nodes and limits")
    return done.stdout.strip()
