"""A sweep's own Ray: no secret in its logs, no port but on loopback, nothing left of it when its driver is killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.tune import local_ray, ray_guard
from pipeline.errors import UserError

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, os, sys, time
from pathlib import Path
from orchestration.tune.ray_cluster import TrialResources, running_ray
from orchestration.tune.ray_tune import ENVIRONMENT
os.environ.update(ENVIRONMENT)
def trial(config):
    tune.report({"has": sum(os.environ.get(name) == "plantedMARK" for name in config["names"])})
with running_ray(None, TrialResources(num_concurrent=1, num_processes=1, gpus=0.0)) as found:
    from ray import tune
    names = [name for name, value in os.environ.items() if value == "plantedMARK"]
    results = tune.Tuner(trial, param_space={"names": names},
                         run_config=tune.RunConfig(storage_path=sys.argv[1], verbose=0)).fit()
    print(json.dumps({"folder": found.folder, "has": results[0].metrics["has"], "names": names}), flush=True)
    time.sleep(300)
"""
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD")


def listening(pids: set[int]) -> set[str]:
    """Addresses, as /proc writes them, on which these processes accept connections."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(fd)))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_secret_in_logs_only_loopback_and_nothing_left_after_a_kill(tmp_path: Path) -> None:
    planted = dict.fromkeys(NAMES, "plantedMARK")
    variables = {**os.environ, **planted, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    driver = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "tune")], env=variables, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    try:
        said = json.loads(driver.stdout.readline())
        assert said["has"] == len(NAMES)  # a trial inherits what it needs
        folder = Path(said["folder"])
        assert folder.stat().st_mode & 0o777 == 0o700
        logs = [p for p in folder.rglob("*") if p.is_file()]
        assert len(logs) > 5
        assert not [p for p in (*logs, *tmp_path.rglob("*")) if p.is_file() and b"plantedMARK" in p.read_bytes()]
        assert not (tmp_path / ".ray").exists()  # no token file
        raylet = next(p for p in ray_guard_processes(folder))
        mark = re.search(rb"NORMFREE_RAY=\w+", Path(f"/proc/{raylet}/environ").read_bytes())
        assert mark is not None
        left = ray_guard.processes_with(mark[0].decode())
        assert len(left) >= 4
        token = re.search(rb"RAY_AUTH_TOKEN=\w{64}\0", Path(f"/proc/{raylet}/environ").read_bytes())
        assert token is not None
        addresses = listening({*left, driver.pid})
        assert addresses and addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    deadline = time.monotonic() + 60
    while (ray_guard.processes_with(mark[0].decode()) or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ray_guard.processes_with(mark[0].decode()) and not folder.exists()


def ray_guard_processes(folder: Path) -> list[int]:
    """Processes of the Ray in `folder`, by their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes()
            if b"raylet" in words and str(folder).encode() in words:
                found.append(int(entry.name))
    return found


MEMORY = """
import time, ray
from orchestration.tune.ray_cluster import TrialResources, running_ray
def trial():
    time.sleep(2)
    return "lived"
with running_ray(None, TrialResources(num_concurrent=1, num_processes=1, gpus=0.0)):
    print(ray.get(ray.remote(max_retries=0)(trial).remote()))
"""


def test_rays_memory_monitor_ends_no_trial() -> None:
    """It did on a full machine, and Tune, which knows no actor that ends so, ended the whole sweep with it."""
    environment = {**os.environ, "RAY_memory_usage_threshold": "0.001"}  # full, as Ray counts here
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["lived"], done.stderr[-2000:]


def test_a_machine_that_is_too_busy_for_ray_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(local_ray.ray, "init", late)
    with pytest.raises(UserError, match=r"did not start on this machine \(The current node timed out.* goes on"):
        local_ray._start(1, "/nothing")
