"""Hosts on one machine: each has its own network, mounts, name, processes, an sshd, and a cable to a bridge.

    with bed(2) as hosts:        h0 = 10.77.0.1, h1 = 10.77.0.2; the office, where people type, is 10.77.0.254
        hosts[1].crash()         all its processes at once, the kernel says goodbye to the others
        hosts[1].power_off(), .power_on()      nobody hears of it; /disk is kept
        hosts[1].unplug(), .plug(), .rate("10mbit"), .loss(5), .delay(50)

Everything lives below one process, the office: when that ends, whatever way, Linux ends the rest. Seen by every host: /shared,
the folders of `see`; its own: /tmp, /dev/shm, /disk. Needs root, and openssh-server, iproute2 and nftables.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NET = "10.77.0"
OFFICE = f"{NET}.254"
TOOLS = ("sshd", "ssh", "ssh-keygen", "ip", "tc", "nft", "nsenter", "unshare", "setpriv")
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str:
    """What this machine lacks for a bed, or nothing."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"hosts in namespaces need {', '.join(missing)}: apt-get install openssh-server openssh-client iproute2 nftables"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


class Place:
    """The office or a host: where a command runs."""

    pid: int
    """Of its first process, as this machine counts."""

    def enter(self) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-i", "-p", "--"]

    def run(self, *words: str, check: bool = True) -> str:
        done = subprocess.run([*self.enter(), *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self, word: str) -> list[int]:
        """Of those whose command line has `word`, as this machine counts them; the place is known by its PID namespace."""
        with contextlib.suppress(FileNotFoundError):
            space = os.readlink(f"/proc/{self.pid}/ns/pid")
            return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_in(pid, space, word)]
        return []


def _is_in(pid: int, space: str, word: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return os.readlink(f"/proc/{pid}/ns/pid") == space and word in words
    except OSError:
        return False


def _first_child(process: "subprocess.Popen[bytes]") -> int:
    """`unshare --fork`'s child is the first process of the namespaces."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if children := listed.read_text().split():
            return int(children[0])
        time.sleep(0.02)
    raise RuntimeError("a host did not start")


class Office(Place):
    def __init__(self, folder: Path, see: Sequence[Path]) -> None:
        self.folder, self.see = folder, see
        # Ends with this process, however that ends.
        end = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen([*end, "sleep", "infinity"], stdin=subprocess.DEVNULL)
        self.pid = _first_child(self.process)
        deadline = time.monotonic() + 60
        while self.run("ls", "/proc/self/ns/net", check=False) == "" and time.monotonic() < deadline:
            time.sleep(0.02)
        self.run("hostname", "office")
        for line in (
            "ip link set lo up",
            "ip link add br0 type bridge",
            f"ip addr add {OFFICE}/24 dev br0",
            "ip link set br0 up",
            f"mount --bind {folder}/hosts /etc/hosts",
            f"mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf",
            f"mount --bind {folder}/ssh /root/.ssh",
            f"mount --bind {folder}/shared /shared",
        ):
            self.run(*line.split())

    def popen(self, *words: str, at: Place | None = None, **variables: str) -> "subprocess.Popen[str]":
        """A command as a person types it there, or at a host, in /shared; output and errors in one."""
        names = {"HOME": "/root", "PATH": f"{Path(sys.executable).parent}:{PATH}", "LANG": "C.UTF-8", **variables}
        return subprocess.Popen(
            [
                *(at or self).enter(),
                "env",
                "-i",
                *(f"{k}={v}" for k, v in names.items()),
                "sh",
                "-c",
                'cd /shared && exec "$@"',
                "sh",
                *words,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


class Host(Place):
    def __init__(self, office: Office, index: int) -> None:
        self.office, self.index, self.name, self.address = office, index, f"h{index}", f"{NET}.{index + 1}"
        self.cable = f"p{index}"
        self.wire: subprocess.Popen[bytes] | None = None
        self.power_on()

    def power_on(self) -> None:
        boot = self.office.folder / f"boot{self.index}.sh"
        boot.write_text(self._boot())
        words = ["nsenter", "-t", str(self.office.pid), "-n", "-m", "-u", "-i", "-p", "--"]
        log = (self.office.folder / f"{self.name}.log").open("ab")
        # nsenter starts unshare, and that the first process.
        self.process = subprocess.Popen(
            [*words, "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", str(boot)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        log.close()
        self.pid = self._first_process()
        ip = ["nsenter", "-t", str(self.office.pid), "-n", "--"]
        # Always the same hardware address: the others keep it for minutes.
        mac = f"02:77:00:00:00:{self.index:02x}"
        add = f"ip link add {self.cable} type veth peer name eth0 address {mac} netns {self.pid}"
        for line in (add, f"ip link set {self.cable} master br0 up"):
            subprocess.run([*ip, *line.split()], check=True)
        deadline = time.monotonic() + 60
        while ":22 " not in self.run("ss", "-ltn", check=False):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(
                    f"{self.name} did not start: {(self.office.folder / f'{self.name}.log').read_text()}"
                )
            time.sleep(0.05)

    def _first_process(self) -> int:
        found = _first_child(self.process)  # unshare
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, IndexError):
                if Path(f"/proc/{found}/comm").read_text().strip() == "unshare":
                    return int(Path(f"/proc/{found}/task/{found}/children").read_text().split()[0])
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not start")

    def _boot(self) -> str:
        folder, disk = self.office.folder, self.office.folder / f"{self.name}.disk"
        disk.mkdir(exist_ok=True)
        seen = [str(p) for p in [*self.office.see, folder] if str(p).startswith("/tmp/")]
        keep = [f"mkdir -p /run/bed/{n}; mount --bind {path} /run/bed/{n}" for n, path in enumerate(seen)]
        back = [f"mkdir -p {path}; mount --bind /run/bed/{n} {path}" for n, path in enumerate(seen)]
        lines = [
            "set -e",
            "mount --make-rprivate /",
            f"hostname {self.name}",
            "while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done",
            f"ip addr add {self.address}/24 dev eth0; ip link set eth0 up; ip link set lo up; ip route add default via {OFFICE}",
            "mount -t tmpfs tmpfs /run; mkdir -p /run/sshd /run/bed",
            *keep,
            f"mount --bind {disk} /disk",
            "mount -t tmpfs -o size=1g tmpfs /tmp; mount -t tmpfs -o size=512m tmpfs /dev/shm",
            *back,
            f"exec /usr/sbin/sshd -D -e -f {folder}/sshd_config",
        ]
        return "\n".join(lines) + "\n"

    def crash(self) -> None:
        """All its processes end at once; the kernel closes their connections, so that the others hear it."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()
        self._unplug_for_good()

    def power_off(self) -> None:
        """The cable first, so that nobody hears of it."""
        self.unplug()
        self.crash()

    def _unplug_for_good(self) -> None:
        self.calm()
        subprocess.run(
            ["nsenter", "-t", str(self.office.pid), "-n", "--", "ip", "link", "del", self.cable],
            stderr=subprocess.DEVNULL,
        )

    def unplug(self) -> None:
        self.office.run("ip", "link", "set", self.cable, "down")

    def plug(self) -> None:
        self.office.run("ip", "link", "set", self.cable, "up")

    def rate(self, text: str) -> None:
        """Both ways, as tc spells it."""
        limit = f"root tbf rate {text} burst 32kb latency 200ms".split()
        self.office.run("tc", "qdisc", "replace", "dev", self.cable, *limit)
        self.run("tc", "qdisc", "replace", "dev", "eth0", *limit)

    def loss(self, percent: int) -> None:
        """Of the packets each way."""
        drop = f"numgen random mod 100 < {percent} drop"
        rules = (
            f"table inet bed {{ chain in {{ type filter hook input priority 0; iifname eth0 {drop}; }}\n"
            f"chain out {{ type filter hook output priority 0; oifname eth0 {drop}; }}\n}}\n"
        )
        subprocess.run([*self.enter(), "nft", "-f", "-"], input=rules, text=True, check=True)

    def delay(self, one_way_ms: int) -> None:
        """Of each packet, both ways, until `calm`: a program in place of the cable, as not every kernel has netem."""
        program = Path(__file__).with_name("delayed_cable.py")
        enter = ["nsenter", "-t", str(self.office.pid), "-n", "--"]
        words = [str(self.pid), self.cable, f"{self.address}/24", OFFICE, str(one_way_ms)]
        self.wire = subprocess.Popen([*enter, sys.executable, str(program), *words], stdout=subprocess.PIPE)
        assert self.wire.stdout is not None and self.wire.stdout.readline() == b"up\n"

    def calm(self) -> None:
        """The cable is a good one again."""
        if self.wire:
            self.wire.send_signal(signal.SIGTERM)
            self.wire.wait(30)
            assert self.wire.stdout is not None
            self.wire.stdout.close()
            self.wire = None
        if self.process.poll() is None:
            self.office.run("tc", "qdisc", "del", "dev", self.cable, "root", check=False)
            self.run("tc", "qdisc", "del", "dev", "eth0", "root", check=False)
            self.run("nft", "delete", "table", "inet", "bed", check=False)


class Bed(list[Host]):
    office: Office
    shared: Path


@contextlib.contextmanager
def bed(num_hosts: int, see: Sequence[Path] = ()) -> Iterator[Bed]:
    """Hosts that are up. Their folder goes with them.

    Args:
        see: folders below /tmp that hosts shall see at the same place, besides this clone and its interpreter.
    """
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="normfree-bed-"))
    try:
        _lay_out(folder, num_hosts)
        office = Office(folder, [ROOT, Path(sys.prefix), Path(sys.base_prefix), *see])
        hosts = Bed()
        hosts.office, hosts.shared = office, folder / "shared"
        try:
            for index in range(num_hosts):
                hosts.append(Host(office, index))
            yield hosts
        finally:
            for host in hosts:
                if host.wire:
                    host.wire.kill()
                    host.wire.wait()
            os.kill(office.pid, signal.SIGKILL)
            office.process.wait()
            for host in hosts:
                host.process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lay_out(folder: Path, num_hosts: int) -> None:
    """Keys, names and settings, the same for all hosts and for the office."""
    for path in map(Path, ("/shared", "/disk", "/run/sshd", "/root/.ssh")):
        path.mkdir(exist_ok=True, mode=0o755 if path.name != ".ssh" else 0o700)
    (folder / "shared").mkdir()
    ssh = folder / "ssh"
    ssh.mkdir(mode=0o700)
    for key in ("id_ed25519", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
    _write(ssh / "authorized_keys", (ssh / "id_ed25519.pub").read_text())
    names = {f"h{i}": f"{NET}.{i + 1}" for i in range(num_hosts)}
    host_key = " ".join((ssh / "host_key.pub").read_text().split()[:2])
    _write(ssh / "known_hosts", "".join(f"{name},{address} {host_key}\n" for name, address in names.items()))
    hosts = ["127.0.0.1 localhost", f"{OFFICE} office", *(f"{address} {name}" for name, address in names.items())]
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    # Else each look-up of an address waits for a name server that is not there.
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    settings = {
        "Port": "22",
        "HostKey": str(ssh / "host_key"),
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "UsePAM": "no",
        "StrictModes": "no",
        "PidFile": "none",
        "MaxStartups": "100",
        "AuthorizedKeysFile": str(ssh / "authorized_keys"),
    }
    _write(folder / "sshd_config", "".join(f"{k} {v}\n" for k, v in settings.items()))
