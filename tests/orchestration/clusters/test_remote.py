"""What a host answers before its agent runs, and what the launcher makes of hosts that are not fit."""

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestration.child_process import ROOT
from orchestration.clusters import many_hosts
from orchestration.clusters.hosts import Host, compare
from orchestration.clusters.job import Job
from orchestration.clusters.remote import Ready, Start, _name
from orchestration.clusters.ssh import Connection, Options, why_ended
from orchestration.spool.process_lock import only_one
from pipeline import places, recipes
from pipeline.errors import UserError
from pipeline.training.run import override


@contextlib.contextmanager
def remote(start: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """What the other end of an ssh says to this start; its input stays open, as the launcher's does. It ends with 2."""
    words = [sys.executable, "-P", "-m", "orchestration.clusters.remote"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(json.dumps({"start": start}) + "\n")
        process.stdin.flush()
        yield (json.loads(line)["normfree"] for line in process.stdout)
        assert process.wait() == 2 and process.stderr.read() == ""


def refused(start: Mapping[str, Any]) -> str:
    with remote(start) as said:
        ready, refusal = said
        assert ready["ready"]["machine"]
        return str(refusal["refused"])


START: dict[str, Any] = {
    "folder": "/",
    "environment": {},
    "store": "127.0.0.1:1",
    "grace_s": 1.0,
    "document": {"out": "/r"},
}


def test_a_host_says_what_it_lacks_and_ends() -> None:
    assert "no folder /nowhere" in refused({**START, "folder": "/nowhere"})


def test_a_place_that_cannot_be_written_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        start = {
            **START,
            "store": f"127.0.0.1:{store.getsockname()[1]}",
            "environment": {"NORMFREE_CACHE": "/dev/null/a/b"},
        }
        assert "Not a directory; mend that, or give another place" in refused(start)


def test_a_second_launch_waits_for_the_first_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    with socket.create_server(("127.0.0.1", 0)) as store, contextlib.ExitStack() as first:
        start = {**START, "store": f"127.0.0.1:{store.getsockname()[1]}"}
        lock = places.private_folder("launch") / f"{_name(Start(**start))}.lock"
        assert first.enter_context(only_one(lock, lambda: False, wait_s=0.1))
        with remote(start) as said:
            next(said)
            assert "another launch of /r is on this host" in next(said)["line"]
            first.close()
            assert list(said)[-1] == {"ended": 2}  # the agent's, whose document is none


def ready(host: str, machine: str, **more: str) -> Ready:
    same = Ready(host=host, machine=machine, versions="python 3.12, torch 2.15", revision="a")
    return dataclasses.replace(same, **more)  # type: ignore[arg-type]


def test_a_machine_under_two_names_is_refused() -> None:
    hosts = {"n1": ready("n1", "1"), "n2": ready("n2", "2")}
    compare(hosts, dict.fromkeys(hosts, 0.0), 1)
    hosts["10.0.0.1"] = ready("n1", "1")
    with pytest.raises(UserError, match=r"n1 and 10\.0\.0\.1 are the same machine"):
        compare(hosts, dict.fromkeys(hosts, 0.0), 1)


@pytest.mark.parametrize(
    ("ahead_s", "message"),
    [
        ((0.0, -600.0), "the clock of n1 is 600 s behind that of n0"),
        ((30.0, 29.0, 45.0), "the clock of n2 is 15 s ahead of that of n0"),
        ((500.0, 495.0), ""),
        ((7.0,), ""),
    ],
)
def test_a_clock_with_which_hosts_forget_each_other_is_refused(ahead_s: tuple[float, ...], message: str) -> None:
    labels = [f"n{number}" for number in range(len(ahead_s))]
    found = {label: ready(label, label) for label in labels}
    clocks = dict(zip(labels, ahead_s, strict=True))
    if not message:
        compare(found, clocks, 1)
        return
    with pytest.raises(UserError, match=message):
        compare(found, clocks, 1)


@pytest.mark.parametrize(
    ("what", "there", "message"),
    [
        ("revision", "b", "n1 has a and n2 b"),
        ("versions", "python 3.12, torch 2.14", r"n1 has torch 2\.15 and n2 torch 2\.14"),
    ],
)
def test_hosts_that_differ_are_refused(what: str, there: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare({"n1": ready("n1", "1"), "n2": ready("n2", "2", **{what: there})}, {"n1": 0.0, "n2": 0.0}, 1)


@pytest.mark.parametrize(
    ("code", "said", "message"),
    [
        (255, "me@n1: Permission denied (publickey).", "refuses this user's key"),
        (126, "env: '/opt/python': Permission denied", "its Python cannot run normfree"),
        (127, "env: '/opt/python': No such file or directory", "no Python where this machine has it"),
        (1, "SyntaxError: invalid syntax", "its Python cannot run normfree"),
        (1, "ModuleNotFoundError: No module named 'torch'", "install the same normfree there"),
        (255, "ssh: connect to host n1 port 22: No route to host", "cannot be reached by ssh"),
        (255, "command-line: line 0: Bad configuration option: prot", "ssh does not take an --ssh-option"),
        (1, "OSError: [Errno 5] Input/output error", "the process there ended with code 1"),
    ],
)
def test_the_end_of_an_ssh_is_told_by_its_cause(code: int, said: str, message: str) -> None:
    assert message in why_ended("n1", code, [said])


def test_a_host_that_does_not_end_is_ended_and_costs_the_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is over on the others, whose code counts."""
    monkeypatch.setattr(many_hosts, "MARGIN_S", 0.0)
    hosts = [Host("n1")]
    recipe = override(recipes.find("nfnet_tiny_glyphs").make(), {"watchdog.grace_s": "1"})
    launch = many_hosts._Launch(Job(run=recipe, out="/r", command="", num_hosts=1, processes=1), hosts, {}, Options())

    async def over() -> bool:
        process = await asyncio.create_subprocess_exec("sleep", "600", stdin=asyncio.subprocess.PIPE)
        connection = Connection(host=hosts[0], process=process, ready=ready("n1", "1"))
        connection.reading = asyncio.create_task(process.wait())  # type: ignore[arg-type]
        launch.open["n1"], launch.run_id, launch.store = connection, "a", "127.0.0.1:1"
        keeper = asyncio.create_task(launch._keep(hosts[0], connection))
        await asyncio.sleep(0.05)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await launch._close()
        return await process.wait() == -9

    assert asyncio.run(over())
