"""Each planted difference or fault is found, with the host's name and what to do; a host that is well has no findings."""

import contextlib
import json
import resource
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from orchestration.cli import main
from orchestration.doctor import comparison, devices, examination, machine, network, storage_checks, text
from orchestration.doctor.conversation import MODULE, Conversation
from orchestration.doctor.examination import Asked, Report
from orchestration.doctor.messages import Examined, Finding, Link
from pipeline.fitting import host_memory
from tests import s3_server

WELL = {
    "code": "c0de",
    "revision": "aaaa",
    "library torch": "2.15.0",
    "devices": "8 x H100",
    "data": "da7a",
    "cores": "96",
}
TOKEN = "ab" * 32
FAST = Link(round_trip_s=1e-4, to_bytes_s=1e9, from_bytes_s=1e9)


def is_found(findings: list[Finding], host: str, *words: str) -> bool:
    (found,) = findings
    return found.host == host and bool(found.remedy) and all(word in f"{found.what} {found.value}" for word in words)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("library torch", "2.14.1", ("library torch", "2.14.1; h0, h2: 2.15.0")),
        ("code", "beef", ("code", "beef; h0, h2: c0de")),
        ("data", "5eed", ("data", "5eed; h0, h2: da7a")),
        ("devices", "7 x H100", ("devices", "7 x H100; h0, h2: 8 x H100")),
    ],
)
def test_the_host_that_is_not_like_the_others_is_named(name: str, value: str, words: tuple[str, ...]) -> None:
    examined = {host: Examined(facts=WELL | {"cores": host}) for host in ("h0", "h1", "h2")}
    assert comparison.differences(examined) == []
    examined["h1"] = Examined(facts=WELL | {name: value})
    assert is_found(comparison.differences(examined), "h1", *words)


def test_another_revision_of_the_same_code_is_no_fault() -> None:
    (found,) = comparison.differences({"h0": Examined(facts=WELL), "h1": Examined(facts=WELL | {"revision": "bbbb"})})
    assert not found.is_fault


def test_a_clock_that_is_off_is_named_and_not_the_others_where_ours_is() -> None:
    assert is_found(comparison.clocks({"h0": 0.4, "h1": -61.0, "h2": 0.1}), "h1", "clock", "61 s behind")
    assert comparison.clocks({"h0": 30.0, "h1": 31.0, "h2": 30.5}) == []
    assert is_found(comparison.clocks({"h0": 0.0, "h1": 9.0}), "h1", "9 s ahead")


def test_a_closed_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    link = network.measure("127.0.0.1", port, TOKEN)
    assert link.error == "Connection refused"
    assert is_found(comparison.links({("h0", "h1"): link}), "h0", "port", "does not reach h1: Connection refused")


def test_a_link_is_measured_in_both_directions_and_answers_only_who_knows_the_token() -> None:
    with contextlib.closing(network.Listener("127.0.0.1", TOKEN)) as listener:
        link = network.measure("127.0.0.1", listener.port, TOKEN)
        assert not link.error and link.bytes_s > 1e6 and 0 < link.round_trip_s < 1
        assert network.measure("127.0.0.1", listener.port, "cd" * 32).error


def test_a_slow_link_and_a_slow_host_are_named() -> None:
    hosts = [f"h{i}" for i in range(5)]
    slow = Link(round_trip_s=1e-4, to_bytes_s=1e9, from_bytes_s=1.2e6)
    late = Link(round_trip_s=0.1, to_bytes_s=1e9, from_bytes_s=1e9)
    every = [pair for round_ in comparison.pairs(hosts) for pair in round_]
    assert comparison.links(dict.fromkeys(every, FAST)) == []
    assert is_found(comparison.links({p: slow if "h3" in p else FAST for p in every}), "h3", "straggler", "10 Mbit/s")
    assert is_found(comparison.links({p: late if "h2" in p else FAST for p in every}), "h2", "straggler", "100.0 ms")
    assert is_found(comparison.links({("h0", "h1"): slow}), "h0", "10 Mbit/s to h1")


@pytest.mark.parametrize("number", [2, 3, 8, 64, 1000])
def test_in_a_round_nobody_is_twice_and_rounds_grow_with_the_logarithm(number: int) -> None:
    rounds = comparison.pairs([str(i) for i in range(number)])
    for pairs in rounds:
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy))
    met = {frozenset(pair) for pairs in rounds for pair in pairs}
    assert len(met) == number * (number - 1) // 2 if number <= 8 else len(rounds) <= 4 * number.bit_length()


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage_checks.disk(tmp_path / "new" / "run", "--out").facts["--out"].startswith(f"{tmp_path}/new/run: ")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8, total=10**9))
    (found,) = storage_checks.disk(tmp_path, "--out").findings
    assert found.what == "--out" and f"0.10 GB free at {tmp_path}" in found.value


def test_an_out_of_its_own_is_seen(tmp_path: Path) -> None:
    for host in ("a", "b"):
        (tmp_path / host).mkdir()
    one, other, same = (storage_checks.SharedPlace(str(tmp_path / host / "run"), "t") for host in ("a", "b", "a"))
    for place, name in ((one, "host0"), (other, "host1"), (same, "host2")):
        place.write(name)
    storage_checks.SEEN_S, before = 0.0, storage_checks.SEEN_S
    assert one.missing(["host0", "host1", "host2"]) == ["host1"] and same.missing(["host0"]) == []
    storage_checks.SEEN_S = before
    for place, name in ((one, "host0"), (other, "host1"), (same, "host2")):
        place.remove(name)
    assert [path for path in tmp_path.rglob("*") if path.name not in "ab"] == []


def test_a_low_limit_of_open_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (1024, 4096) if kind == resource.RLIMIT_NOFILE else (-1, -1)
    )
    assert machine.limits(16).findings == []
    (found,) = machine.limits(1024).findings
    assert found.what == "open files" and "1024" in found.value and "ulimit -n 4608" in found.remedy


def test_a_name_that_stands_for_the_loopback_is_a_fault_between_hosts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_addresses", lambda host: iter(["127.0.1.1"]))
    (found,) = machine.names(2).findings
    assert "127.0.1.1" in found.value and "GLOO_SOCKET_IFNAME" in found.remedy and machine.names(1).findings == []


def test_the_limit_of_a_container_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = "/sys/fs/cgroup/job"
    files = {"/proc/self/cgroup": "0::/job/step\n", f"{groups}/memory.max": "2147483648\n"}
    files[f"{groups}/step/memory.max"] = "max\n"

    def read(path: Path, *_: Any) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert host_memory.cgroup_limit_bytes() == 2 << 30
    files |= {f"{groups}/memory.current": "1073741824", f"{groups}/memory.stat": "anon 7\ninactive_file 1000\n"}
    assert host_memory.available_bytes() == min((1 << 30) + 1000, psutil.virtual_memory().available)


class Nvml:
    """NVIDIA's management library with eight GPUs, of which one has lost memory, is hot, and has a link down."""

    class NVMLError(Exception):
        pass

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_NVLINK_MAX_LINKS = 18
    NVML_FEATURE_ENABLED = 1
    nvmlClocksEventReasonHwThermalSlowdown = 64

    def nvmlDeviceGetCount(self) -> int:
        return 8

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetTotalEccErrors(self, gpu: int, *_: int) -> int:
        return 3 if gpu == 5 else 0

    def nvmlDeviceGetRemappedRows(self, gpu: int) -> tuple[int, int, bool, bool]:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: int) -> int:
        return 64 if gpu == 5 else 0

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return SimpleNamespace(used=0)

    def nvmlDeviceGetNvLinkState(self, gpu: int, link: int) -> int:
        return int(not (gpu == 5 and link == 7))


def test_a_gpu_that_is_not_well_is_named() -> None:
    found = devices._all_gpus(Nvml())
    assert found.facts == {"driver": "570.1", "NVLink": "18 links a GPU"}
    assert [f.what for f in found.findings] == ["GPU 5 ECC", "GPU 5 throttling", "GPU 5 NVLink"]
    assert "17 of 18" in found.findings[-1].value


@pytest.mark.slow
def test_a_bucket_is_written_listed_read_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage import objects

    if s3_server.find_server() is None:
        pytest.skip("no SeaweedFS here")
    (tmp_path / "s3").mkdir()
    with s3_server.s3_server(tmp_path / "s3") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{s3_server.BUCKET}/runs/mine"
        found = storage_checks.bucket(url)
        assert all(finding.what == "--out speed" for finding in found.findings)  # which a busy machine may earn
        assert "MB/s" in found.facts[f"--out {url}"] and objects.list_urls(url) == []
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        objects.clients.client(url)[0].clear_instance_cache()
        assert "not usable" in storage_checks.bucket(url).facts.values()


def test_a_store_that_takes_writes_alone_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage import objects

    def refuse(url: str) -> list[str]:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(objects, "list_urls", refuse)
    (found,) = storage_checks.bucket("memory://doctor/run").findings
    assert found.value == "PermissionError: AccessDenied (it could write)" and "rights" in found.remedy
    monkeypatch.undo()
    assert objects.list_urls("memory://doctor/run") == []


def test_a_dataset_is_read_and_one_that_is_none_is_a_fault(digits: str) -> None:
    from pipeline.data.format.manifest import Manifest

    found = storage_checks.dataset(digits)
    assert found.facts["data"] == Manifest.open(digits).digest[:16] and found.findings == []
    assert "there is no dataset" in storage_checks.dataset("/nowhere").findings[0].value


def test_a_tracker_that_does_not_answer_is_a_fault() -> None:
    assert "cannot use MLflow" in storage_checks.tracker("http://127.0.0.1:9").findings[0].value


def test_hosts_are_examined_together(tmp_path: Path) -> None:
    """Two processes as hosts, one with few files; each alone, their one place, their network, all-reduces over both."""
    few = ["prlimit", "--nofile=300", sys.executable, "-P", "-m", MODULE, "-"]
    lost = ["sh", "-c", "echo no route >&2; exit 255"]
    with Conversation("h0") as h0, Conversation("h1", few) as h1, Conversation("h2", lost) as h2:
        report = examination.of_hosts([h0, h1, h2], Asked(out=str(tmp_path / "run"), parity=False))
    faults = {(f.host, f.what): f.value for f in report.faults if f.what not in ("memory", "name server", "name")}
    assert set(faults) == {("h1", "open files"), ("h2", "ssh")}, report.findings
    assert "code 255 (no route)" in faults["h2", "ssh"]
    assert report.links["h0", "h1"].bytes_s > 1e6
    assert report.sweep is not None and not report.sweep.error and report.sweep.num_ranks == 2
    assert list(tmp_path.iterdir()) == []
    json.dumps(report.to_json())
    shown = "\n".join(text.lines(report))
    assert "all-reduce, gloo, 2 ranks" in shown and "2 hosts examined: " in shown


def test_what_hosts_say_moves_no_cursor_and_many_lines_are_cut() -> None:
    findings = [Finding(host=f"h{i}", what="x", value="a\x1b[2Jb") for i in range(500)]
    report = Report(facts={f"h{i}": {"python": "\x1b[2J"} for i in range(500)}, findings=findings)
    shown = text.lines(report)
    assert len(shown) < 80 and not any("\x1b" in line for line in shown)


def test_the_command_says_what_is_to_be_mended_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    well = Report(facts={"h0": {"python": "3"}})
    monkeypatch.setattr(examination, "of_this_host", lambda asked: well)
    assert main(["doctor", "--quick"]) == 0 and "all is well" in capsys.readouterr().out
    well.findings.append(Finding(host="h0", what="memory", value="1 GiB", remedy="more"))
    assert main(["doctor", "--quick", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["is_well"] is False and found["findings"][0]["host"] == "h0"
    assert main(["doctor", "--tracking-uri", str(tmp_path)]) == 2
