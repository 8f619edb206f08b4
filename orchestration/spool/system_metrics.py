"""What a node does while it trains: processor, memory, disk, network, and those GPUs only that the job was given.

One process a node (`start_sampler`), next to the trainer and not in it, appends lines to a spool of its own,
`<run>/system-<node>.jsonl`; the uploader of the run takes them all along, so a run of many nodes shows each under
`system/<node>/`. Steps are counted on over restarts. On nodes whose run folder is in an object store, the spool is
mirrored there (`orchestration.spool.mirror`), and the first node's uploader brings it back.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from orchestration import child_process
from orchestration.spool.mirror import Mirror
from orchestration.spool.process_lock import only_one
from orchestration.spool.spool import is_torn
from pipeline import gpus, places
from pipeline.storage.process_identity import started_at

SAMPLE_EVERY_S = 15.0


class Sampler:
    """One node's readings. `disk` is a path on the volume to watch; rates are since the reading before."""

    def __init__(self, disk: str | os.PathLike[str]) -> None:
        self._disk = os.fspath(disk)
        self._before: tuple[float, dict[str, float]] | None = None
        psutil.cpu_percent(interval=None)  # the first answer has nothing to compare with

    def sample(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self._disk)
        values = {
            "cpu_percent": psutil.cpu_percent(interval=None),
            "memory_used_mib": (memory.total - memory.available) / 2**20,
            "memory_percent": memory.percent,
            "disk_used_percent": disk.percent,
            "disk_free_gib": disk.free / 2**30,
        }
        return values | self._rates() | gpus.readings()

    def _rates(self) -> dict[str, float]:
        network, disk, now = psutil.net_io_counters(), psutil.disk_io_counters(), time.monotonic()
        total = {"network_received": network.bytes_recv, "network_sent": network.bytes_sent} if network else {}
        total |= {"disk_read": disk.read_bytes, "disk_written": disk.write_bytes} if disk else {}
        before, self._before = self._before, (now, total)
        if before is None or now <= before[0]:
            return {}
        return {f"{k}_mb_per_s": (v - before[1].get(k, v)) / 1e6 / (now - before[0]) for k, v in total.items()}


def node_name() -> str:
    """Of this machine: NORMFREE_NODE, else its host name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", os.environ.get("NORMFREE_NODE") or socket.gethostname())


def spool_name(node: str) -> str:
    return f"system-{node}.jsonl"


def start_sampler(run_dir: str | os.PathLike[str], mirror: str | None = None) -> subprocess.Popen[bytes]:
    """The process that writes this node's spool into `run_dir` for as long as this process lives.

    With `mirror`, a run folder in an object store, it also copies it there: for nodes that have no uploader.
    """
    words = [os.path.abspath(run_dir), "--watch-pid", str(os.getpid()), *(["--mirror", mirror] if mirror else [])]
    # It outlives us by a last copy into the mirror; then it ends by itself.
    return child_process.start("orchestration.spool.system_metrics", words, on_parent_death=None, own_session=True)


def follow(run_dir: Path, node: str, pid: int, *, every_s: float = SAMPLE_EVERY_S) -> None:
    """Samples while the process `pid` lives. One sampler a node and run folder, however many are started."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path, since = run_dir / spool_name(node), started_at(pid)

    def alive() -> bool:
        return since is not None and started_at(pid) == since

    with only_one(path.with_suffix(".lock"), alive, wait_s=0.0) as mine:
        if not mine:
            return
        if is_torn(path):
            with open(path, "a", encoding="utf-8", opener=places.no_follow) as file:
                file.write("\n")
        step = sum(1 for _ in path.open("rb")) if path.exists() else 0
        sampler = Sampler(run_dir)
        while alive():
            step += 1
            line = {"kind": "System", "node": node, "step": step, "time_s": time.time(), "values": sampler.sample()}
            with open(path, "a", encoding="utf-8", opener=places.no_follow) as file:
                file.write(json.dumps(line) + "\n")
            next_s = time.monotonic() + every_s
            while time.monotonic() < next_s and alive():
                time.sleep(min(1.0, every_s))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m orchestration.spool.system_metrics", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--watch-pid", type=int, required=True, metavar="PID")
    parser.add_argument("--mirror", metavar="URL")
    parser.add_argument("--every-s", type=float, default=SAMPLE_EVERY_S)
    args = parser.parse_args(arguments)
    os.nice(10)
    run_dir, node = Path(args.run_dir), node_name()
    with Mirror(run_dir, args.mirror, own=(spool_name(node),)) if args.mirror else contextlib.nullcontext():
        follow(run_dir, node, args.watch_pid, every_s=args.every_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
