"""The script of `normfree launch --slurm` under Slurm itself, on hosts in namespaces: its daemons are Debian's."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bed import OFFICE, ROOT, Bed, bed

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """\
ClusterName=bed
SlurmctldHost=office({office})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
EnforcePartLimits=ALL
SlurmdTimeout=60
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=h[0-1] NodeAddr=h[0-1] CPUs=2 RealMemory=2000
PartitionName=main Nodes=h[0-1] Default={default} MaxTime=01:00:00 State=UP
"""


class Cluster:
    """A controller in the office, a daemon on each host."""

    def __init__(self, hosts: Bed, *, default: str = "YES") -> None:
        self.hosts, folder = hosts, hosts.office.folder / "slurm"
        for name in (folder, folder / "munge", folder / "state", *(folder / f"spool-{h.name}" for h in hosts)):
            name.mkdir()
        hosts.office.folder.chmod(0o755)
        self.file = folder / "slurm.conf"
        self.file.write_text(CONFIGURATION.format(office=OFFICE, folder=folder, default=default))
        munge = folder / "munge"
        (munge / "key").write_bytes(os.urandom(64))
        (munge / "key").chmod(0o400)
        subprocess.run(["chown", "-R", "munge:munge", str(munge)], check=True)
        munge.chmod(0o755)
        files = [
            f"--{name}={munge}/{name.removesuffix('-file')}"
            for name in ("pid-file", "log-file", "seed-file", "key-file")
        ]
        self.daemons = [
            hosts.office.popen("runuser", "-u", "munge", "--", "munged", "-F", f"--socket={munge}/socket", *files),
            hosts.office.popen("slurmctld", "-D", "-f", str(self.file)),
            *(hosts.office.popen("slurmd", "-D", "-N", h.name, "-f", str(self.file), at=h) for h in hosts),
        ]
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%t", check=False).split() == ["idle"], "idle nodes")

    def run(self, *words: str, check: bool = True) -> str:
        process = self.hosts.office.popen(*words, **self.variables)
        out = process.communicate()[0]
        assert not check or process.returncode == 0, out
        return out

    @property
    def variables(self) -> dict[str, str]:
        return {
            "SLURM_CONF": str(self.file),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NORMFREE_CACHE": "/disk/cache",
        }

    def wait(self, is_so: Callable[[], bool], what: str, wait_s: float = 1200) -> None:
        deadline = time.monotonic() + wait_s
        while not is_so():
            assert time.monotonic() < deadline, (
                f"no {what}: {self.run('scontrol', 'show', 'job', check=False)}{self.output()}"
            )
            time.sleep(0.5)

    def output(self) -> str:
        return "".join(path.read_text() for path in self.hosts.shared.glob("*.out"))

    def launch(self, *words: str) -> str:
        return self.run(
            sys.executable,
            "-P",
            "-m",
            "orchestration.cli",
            "launch",
            "nfnet_tiny_glyphs",
            "--slurm",
            *words,
            check=False,
        )


@pytest.fixture
def hosts(digits: str) -> Iterator[Bed]:
    missing = [name for name in DAEMONS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing:
        pytest.skip(f"Slurm is not here ({', '.join(missing)}): apt-get install slurm-wlm munge")
    with bed(2) as found:
        shutil.copytree(digits, found.shared / "digits")
        yield found


FIELDS = shlex.split(
    "--global_batch 16 --augment.image_px 64 --optim.warmup '5 steps' --engine.parity_check false --log_every_steps 1 "
    "--duration '60 steps' --save_every '5 steps' --watchdog.grace_s 30"
)


@pytest.mark.slow
def test_a_job_saves_ahead_of_its_limit_is_queued_again_and_finishes(hosts: Bed, digits: str, tmp_path: Path) -> None:
    cluster = Cluster(hosts)
    said = cluster.launch(
        *FIELDS, "--nodes", "2", "--time", "50", "--data.url", "/shared/digits", "--out", "/shared/run"
    )
    found = re.search(r"Submitted batch job (\d+)", said)
    assert found, said
    job = found[1]
    cluster.wait(lambda: "saved" in cluster.output(), "checkpoint")
    elapsed = cluster.run("squeue", "-h", "-j", job, "-o", "%M").strip()  # [hours:]minutes:seconds
    minutes = sum(int(n) * 60**i for i, n in enumerate(reversed(elapsed.split(":")))) // 60
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")
    cluster.wait(lambda: "queued again" in cluster.output(), "requeue")
    cluster.wait(lambda: "PENDING" in cluster.run("scontrol", "show", "job", job), "pending job")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=50", "StartTime=now")
    cluster.wait(lambda: "COMPLETED" in cluster.run("scontrol", "show", "job", job), "end")
    shown = cluster.run("scontrol", "show", "job", job)
    assert "Restarts=1" in shown and "ExitCode=0:0" in shown
    assert int(re.findall(r"from  step (\d+)", cluster.output())[1]) >= 5
    undisturbed = tmp_path / "run"
    words = [sys.executable, "-m", "orchestration.cli", "pretrain", "nfnet_tiny_glyphs", *FIELDS, "--data.url", digits]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*words, "--out", str(undisturbed), "--num-processes", "2"], cwd=ROOT, env=variables, check=True)
    from pipeline.models.backbone import load_backbone

    ours, theirs = (load_backbone(str(run), "raw").model.state_dict() for run in (hosts.shared / "run", undisturbed))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_queued_again(hosts: Bed) -> None:
    cluster = Cluster(hosts)
    words = (
        *FIELDS,
        "--duration",
        "1000 steps",
        "--nodes",
        "2",
        "--time",
        "50",
        "--data.url",
        "/shared/digits",
        "--out",
        "/shared/run",
    )
    found = re.search(r"Submitted batch job (\d+)", cluster.launch(*words))
    assert found
    cluster.wait(lambda: "saved" in cluster.output(), "checkpoint")
    cluster.run("scancel", found[1])
    cluster.wait(lambda: "stopped" in cluster.output(), "stop")
    cluster.wait(lambda: cluster.run("squeue", "-h").strip() == "", "empty queue")
    assert "queued again" not in cluster.output()


@pytest.mark.slow
def test_a_job_that_slurm_refuses_is_one_sentence(hosts: Bed) -> None:
    cluster = Cluster(hosts, default="NO")
    place = ("--data.url", "/shared/digits", "--out", "/shared/run")
    for words, message in (
        (("--nodes", "2"), "no default partition: give --partition, one of main"),
        (("--nodes", "2", "--partition", "gpu"), "invalid partition"),
        (("--nodes", "64", "--partition", "main"), "Slurm refuses the job"),
        (("--nodes", "2", "--partition", "main", "--time", "9-00:00:00"), "Slurm refuses the job"),
    ):
        last = cluster.launch(*FIELDS, *words, *place, "--global_batch", "64").strip().splitlines()[-1]
        assert last.startswith("normfree: ") and message in last
    assert cluster.run("squeue", "-h") == ""
