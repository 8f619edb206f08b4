"""`normfree launch` without machines: host lists, refusals, and what others run (Slurm, Kubernetes, torchrun, Ray)."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.cli import build_parser, main
from orchestration.clusters import environment, hosts
from pipeline.errors import UserError
from pipeline.training.run import Run, load_yaml

RECIPE = "launch nfnet_tiny_glyphs --data.url s3://b/glyphs --out s3://b/runs/a"
SECRET = "do-not-print-me"


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("UNRELATED", "nobody's business")


def printed(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(words)) == 0
    out = capsys.readouterr().out
    assert SECRET not in out and "UNRELATED" not in out
    return out


def test_a_hostfile_is_read_as_openmpi_and_deepspeed_read_it(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# machines\nn1 slots=8\n\nuser@n2 slots=8 max_slots=16  # the new one\n10.0.0.3 slots=8\n")
    found = hosts.from_file(str(file))
    assert [(h.name, h.label, h.slots) for h in found] == [
        ("n1", "n1", 8),
        ("user@n2", "n2", 8),
        ("10.0.0.3", "10.0.0.3", 8),
    ]
    assert hosts.processes_per_host(found, None) == 8 and hosts.processes_per_host(found, 4) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1\nn2\nn1\n", "n1 twice"),
        ("n1\nother@N1\n", "N1 twice"),
        ("n1 slots=4\nn2 slots=8\n", "n1 has 4 and n2 8"),
        ("n1 slots=4\nn2\n", "n1 has 4 and n2 none"),
        ("n1 slot=4\n", "line 1, has 'slot=4'"),
        ("n1 slots=0\n", "slots=0"),
        ("-oProxyCommand=x\n", "no name of a host"),
        ("n1;reboot\n", "no name of a host"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text(text)
    assert main([*shlex.split(RECIPE), "--hostfile", str(tmp_path / "hosts"), "--dry-run"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("normfree: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{RECIPE}", "says where to run"),
        (f"{RECIPE} --hosts a,b --slurm", "--hosts and --slurm"),
        (f"{RECIPE} --hosts a,a --dry-run", "a twice"),
        (f"{RECIPE} --hosts a,b --min-hosts 3 --dry-run", "--min-hosts is 3"),
        (f"{RECIPE} --hosts a,b,c --dry-run", "global_batch 128 does not divide over 3"),
        (f"{RECIPE} --hosts a --processes-per-host 0 --dry-run", "--processes-per-host is 0"),
        (f"{RECIPE} --hosts a --ssh-option ProxyCommand --dry-run", "NAME=VALUE"),
        (f"{RECIPE} --hosts a --python python3 --dry-run", "whole path"),
        (f"{RECIPE} --hosts a --env NOT_THERE --dry-run", "not set here"),
        (f"{RECIPE} --hosts a --optim.learning_rat 1 --dry-run", "did you mean --optim.learning_rate?"),
        ("launch nfnet_tiny_glyphs --hosts a --data.url s3://b/g --dry-run", "--out"),
        ("launch nfnet_tiny_glyphs --hosts a --out s3://b/r --dry-run", "no data"),
        (f"{RECIPE} --slurm --dry-run", "give --nodes"),
        (f"{RECIPE} --slurm --nodes 2 --time soon --dry-run", "--time 'soon'"),
        (f"{RECIPE} --slurm --nodes 2 --slurm-option signal=USR1 --dry-run", "the script sets it"),
        (f"{RECIPE} --kubernetes --nodes 2", "--image"),
        (f"{RECIPE} --kubernetes --nodes 2 --image a --job-name A_b", "--job-name 'A_b'"),
        ("launch nfnet_tiny_glyphs --data.url s3://b/g --out runs/a --kubernetes --nodes 2 --image a", "share no disk"),
        (f"{RECIPE} --torchrun", "needs the machines"),
        (f"{RECIPE} --ray h:1", "--ray is for sweeps"),
        ("launch transfer -- s3://b/c --suite demo --data-root s3://b/d --out s3://b/s", "runs on Ray"),
        (
            "launch transfer --ray h:1 -- s3://b/c --suite demo --data-root s3://b/d --out s3://b/s --wrong",
            "no --wrong here",
        ),
    ],
)
def test_bad_input_is_one_sentence(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(words)) == 2
    assert message in capsys.readouterr().err


def test_a_job_without_sbatch_or_a_default_partition_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestration.clusters import slurm

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch on this machine"):
        slurm.submit("", has_partition=True)
    for name, body in (("sbatch", "echo 'sbatch: error: never reached' >&2; exit 1"), ("sinfo", "echo gpu; echo cpu")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(UserError, match="give --partition, one of gpu, cpu"):
        slurm.submit("", has_partition=False)
    with pytest.raises(UserError, match="refuses the job: never reached"):
        slurm.submit("", has_partition=True)


def test_no_option_of_launch_hides_a_field_of_a_run() -> None:
    from orchestration.commands.field_help import describe

    options = {option[2:] for option in build_parser().command("launch").options()}
    assert not options & {field.path for field in describe(Run)}


def test_a_dry_run_says_what_each_host_gets(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"{RECIPE} --hosts n1,user@n2 --processes-per-host 4 --ssh-option Port=2222 --interface ib0 --dry-run --seed 3"
    )
    out = printed(words, capsys)
    lines = [line.strip() for line in out.splitlines()]
    first, second = (shlex.split(line) for line in lines if line.startswith("ssh "))
    assert first[:4] == ["ssh", "-T", "-o", "Port=2222"]  # the first of equal options counts for ssh
    assert (first[-2], second[-2]) == ("n1", "user@n2") and sys.executable in first[-1]
    assert "AWS_ENDPOINT_URL=http://store:9000" in lines and "OMP_NUM_THREADS=3" in lines
    assert "AWS_SECRET_ACCESS_KEY=(its value here, not shown)" in lines
    assert {"seed: 3", "interface: ib0", "processes: 4", "out: s3://b/runs/a"} <= set(lines)
    assert str(Path.cwd()) in out


def test_the_environment_is_a_closed_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("PATH", f"relative:{Path('/usr/bin')}")
    found = environment.launched(["UNRELATED"], tracking_uri="http://user:word@t", python="/opt/v/bin/python")
    assert found["UNRELATED"] and found["NCCL_DEBUG"] == "INFO" and found["PATH"] == "/opt/v/bin:/usr/bin"
    assert not {"HOME", "USER", "RANK", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD"} & set(found)
    assert "word" not in "".join(environment.shown(found))


def document_of(script: str, tmp_path: Path) -> dict[str, Any]:
    """What the agent reads, as bash makes it of the here-document."""
    body = re.search(r"<<JOB\n.*?\nJOB\n", script, re.DOTALL)
    assert body
    done = subprocess.run(
        ["bash", "-c", f"store=10.0.0.1:5; run_id=7-0; cat {body[0]}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_slurm_script_asks_for_what_a_run_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{RECIPE} --slurm --nodes 8 --min-hosts 6 --gpus-per-host 8 --partition gpu --account a --time 1-12:00:00 --dry-run"
    out = printed(
        f"{words} --slurm-option constraint=h100 --watchdog.grace_s 90 --name 'it is `date` $HOME \\'", capsys
    )
    asked = re.findall(r"^#SBATCH --(.*)$", out, re.MULTILINE)
    assert {
        "nodes=6-8",
        "ntasks-per-node=1",
        "gpus-per-node=8",
        "partition=gpu",
        "account=a",
        "time=1-12:00:00",
    } <= set(asked)
    assert {"signal=TERM@150", "requeue", "open-mode=append", "no-kill", "constraint=h100"} <= set(asked)
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    document = document_of(out, tmp_path)
    run = load_yaml(document.pop("run"), "the script")
    assert run.name == "it is `date` $HOME \\"  # nothing of a run is for the shell
    assert (document["store"], document["run_id"], document["processes"], document["max_hosts"]) == (
        "10.0.0.1:5",
        "7-0",
        8,
        8,
    )


def manifests(words: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(printed(words, capsys)))


KUBERNETES = (
    f"{RECIPE} --nodes 4 --gpus-per-host 8 --image registry.io/normfree:1 --spot --memory 64Gi --cpus-per-host 16"
)
SWEEP = (
    "launch transfer --kubernetes --nodes 4 --image registry.io/normfree:1 --gpus-per-host 1 -- s3://b/c --suite demo "
    "--data-root s3://b/d --out s3://b/s"
)


def pods(manifest: Any) -> list[dict[str, Any]]:
    """Every pod's specification in it."""
    if isinstance(manifest, list):
        return [pod for each in manifest for pod in pods(each)]
    if not isinstance(manifest, dict):
        return []
    return [manifest] if "containers" in manifest else [pod for each in manifest.values() for pod in pods(each)]


@pytest.mark.parametrize("form", [f"{KUBERNETES} --kubernetes", f"{KUBERNETES} --kubernetes job", SWEEP])
def test_manifests_have_their_types_and_name_their_secrets(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = manifests(form, capsys)
    for pod in pods(found):
        for container in pod["containers"]:
            assert container["image"] == "registry.io/normfree:1" and container["name"]
            for variable in container.get("env", []):
                assert ("value" in variable) != ("valueFrom" in variable)
        assert pod["terminationGracePeriodSeconds"] >= 30
        known = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for c in pod["containers"] for mount in c.get("volumeMounts", [])} <= known
        assert all(t["operator"] == "Exists" for t in pod.get("tolerations", []))
    referred = {
        v["name"]: v["valueFrom"]
        for p in pods(found)
        for c in p["containers"]
        for v in c.get("env", [])
        if "valueFrom" in v
    }
    assert referred["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "normfree", "key": "AWS_SECRET_ACCESS_KEY"}}
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra dev)")
    for manifest in found:
        if manifest["apiVersion"] in ("v1", "batch/v1"):
            validate.validate(manifest, "1.30", strict=True)
    for manifest in (m for m in found if m["kind"] == "JobSet"):
        api = pytest.importorskip(
            "kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed (extra dev)"
        )
        assert api.JobsetV1alpha2JobSet.from_dict(manifest)
        for replicated in manifest["spec"]["replicatedJobs"]:  # the types let unknown fields of jobs pass
            job = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": "a"},
                "spec": replicated["template"]["spec"],
            }
            validate.validate(job, "1.30", strict=True)


def hosts_job(found: list[dict[str, Any]]) -> dict[str, Any]:
    last = found[-1]["spec"]
    return last["replicatedJobs"][1]["template"]["spec"] if found[-1]["kind"] == "JobSet" else last


@pytest.mark.parametrize("kind", ["jobset", "job"])
def test_a_pod_comes_back_after_a_signal_and_not_after_a_mistake(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = manifests(f"{KUBERNETES} --kubernetes {kind}", capsys)
    job = hosts_job(found)
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == 4
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy needs
    actions = {
        v: r["action"]
        for r in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in r
        for v in r["onExitCodes"]["values"]
    }
    assert actions == {75: "Ignore", 2: "FailJob"}
    assert all(r["onExitCodes"]["operator"] == "In" for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r)
    limits = job["template"]["spec"]["containers"][0]["resources"]
    assert limits == {"requests": {"cpu": "16", "memory": "64Gi"}, "limits": {"nvidia.com/gpu": "8"}}


@pytest.mark.parametrize(("kind", "store"), [("jobset", "{n}-store-0-0.{n}:29400"), ("job", "{n}-0.{n}:29400")])
def test_the_hosts_find_the_store_by_a_name_that_the_manifest_makes(
    kind: str, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = manifests(f"{KUBERNETES} --kubernetes {kind} --job-name mine", capsys)
    document = json.loads(found[0]["data"]["job.json"])
    assert document["store"] == store.format(n="mine") and document["max_hosts"] == 4
    spec = found[-1]["spec"]
    if kind == "jobset":
        assert spec["network"]["subdomain"] == "mine" and spec["startupPolicy"]["startupPolicyOrder"] in (
            "InOrder",
            "AnyOrder",
        )
        assert spec["successPolicy"] == {"operator": "All", "targetReplicatedJobs": ["hosts"]}
    else:
        service = found[1]
        assert (
            service["spec"]["clusterIP"] == "None"
            and service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
        )
        assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
        assert spec["template"]["spec"]["initContainers"][0]["restartPolicy"] == "Always"


def test_a_sweep_is_a_rayjob_whose_trials_run_on_workers(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = manifests(SWEEP, capsys)
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayJob")
    words = shlex.split(found["spec"]["entrypoint"])
    assert words[:3] == ["normfree", "transfer", "s3://b/c"] and words[-2:] == ["--ray-address", "auto"]
    assert build_parser().parse_args(words[1:]).ray_address == "auto"
    cluster = found["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert [g["replicas"] for g in cluster["workerGroupSpecs"]] == [4]


def test_torchrun_and_ray_lines_can_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(f"{RECIPE} --torchrun --hosts n1,n2 --processes-per-host 8 --seed 3", capsys)
    for name, line in zip(("n1", "n2"), out.splitlines(), strict=True):
        assert line.startswith(f"{name}: ")
        words = shlex.split(line.partition("torchrun ")[2])
        at = words.index("normfree")
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[:at] + words[at:])
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("1:2", "8", "n1:29400")
        assert words[at:] == shlex.split(
            "normfree pretrain nfnet_tiny_glyphs --out s3://b/runs/a --data.url s3://b/glyphs --seed 3"
        )
    line = printed("launch transfer --ray h:6379 -- s3://b/c --suite demo --data-root s3://b/d --out s3://b/s", capsys)
    assert build_parser().parse_args(shlex.split(line)[1:]).ray_address == "h:6379"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here")
def test_ssh_takes_the_options() -> None:
    from orchestration.clusters.ssh import Options, command

    words = command(hosts.Host("user@n1"), Options(ssh_options=("Port=2222", "ConnectTimeout=3")))
    asked = subprocess.run(["ssh", "-G", *words[1:-3], words[-2]], capture_output=True, text=True, check=True).stdout
    assert {"port 2222", "connecttimeout 3", "batchmode yes", "user user"} <= set(asked.splitlines())
