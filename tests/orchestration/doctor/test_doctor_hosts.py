"""`normfree doctor --hosts` over hosts of their own network, mounts and limits: what is planted on one of them is found there."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BED = Path(__file__).parents[1] / "clusters" / "bed.py"
_spec = importlib.util.spec_from_file_location("bed_of_hosts", BED)
assert _spec and _spec.loader
bed = importlib.util.module_from_spec(_spec)
sys.modules["bed_of_hosts"] = bed
_spec.loader.exec_module(bed)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hosts() -> Iterator[Any]:
    with bed.bed(3) as found:
        yield found


def doctor(hosts: Any, *words: str) -> tuple[int, dict[tuple[str, str], str], dict[str, Any]]:
    """Exit code, faults by host and what, and the whole report; what is said of this small machine itself is passed over."""
    names = ["--hosts", ",".join(host.name for host in hosts)] if "--hosts" not in words else []
    process = hosts.office.popen("normfree", "doctor", *names, "--quick", "--json", *words)
    said = process.communicate(timeout=400)[0]
    assert "{" in said, said
    report = json.loads(said[said.index("{\n") :])
    faults = {(f["host"], f["what"]): f["value"] for f in report["findings"] if f["is_fault"] and f["what"] != "memory"}
    return process.returncode, faults, report


def test_hosts_that_are_well_and_share_a_folder(hosts: Any) -> None:
    code, faults, report = doctor(hosts, "--out", "/shared/run")
    assert faults == {} and set(report["hosts"]) == {"h0", "h1", "h2"} and code in (0, 1)
    assert len(report["links"]) == 3 and report["all_reduce"]["num_ranks"] == 3 and not report["all_reduce"]["error"]
    assert [p for p in hosts.shared.iterdir() if p.name.startswith(".normfree")] == []


def test_what_is_planted_on_hosts_is_found(hosts: Any, digits: str) -> None:
    """A slow link, an --out of each host's own, a dataset that is another, one name that stands for 127.0.1.1."""
    for host in hosts:
        folder = hosts.office.folder / f"{host.name}.disk" / "data"
        shutil.copytree(digits, folder)
    manifest = hosts.office.folder / "h2.disk" / "data" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    hosts[1].rate("10mbit")
    hosts[0].run(
        "sh",
        "-c",
        "grep -v h0 /etc/hosts > /tmp/hosts; echo 127.0.1.1 h0 >> /tmp/hosts; mount --bind /tmp/hosts /etc/hosts",
    )
    try:
        code, faults, _ = doctor(hosts, "--out", "/disk/run", "--data", "/disk/data")
    finally:
        hosts[1].calm()
        hosts[0].run("umount", "/etc/hosts")
    assert code == 1
    assert (
        "straggler" in faults["h1", "network"] and ("h0", "network") not in faults and ("h2", "network") not in faults
    )
    assert all("is not that of" in faults[host, "--out"] for host in ("h0", "h1", "h2"))
    assert "is damaged" in faults["h2", "--data"] and "127.0.1.1" in faults["h0", "name"]


def test_a_closed_port_and_a_host_that_is_down(hosts: Any) -> None:
    hosts[2].run("nft", "add", "table", "inet", "shut")
    rules = "table inet shut { chain in { type filter hook input priority 0; tcp dport != 22 ct state new drop; }; }"
    hosts[2].run("nft", rules)
    hosts[1].unplug()
    try:
        code, faults, report = doctor(hosts)
    finally:
        hosts[1].plug()
        hosts[2].run("nft", "delete", "table", "inet", "shut")
    assert code == 1 and set(faults) == {("h1", "ssh"), ("h0", "port")}, faults
    assert (
        "does not reach h2: no answer within" in faults["h0", "port"]
        and "cannot be reached by ssh" in faults["h1", "ssh"]
    )
    assert set(report["hosts"]) == {"h0", "h2"}


def test_a_host_without_a_name_is_said_with_what_to_do(hosts: Any) -> None:
    code, faults, _ = doctor(hosts, "--hosts", "h0,nowhere")
    assert code == 1 and "nowhere: no such host" in faults["nowhere", "ssh"]
