"""Run by test_saver_killed.py: two ranks save three times; one is killed at a point of the third save; what is left then?

Processes are forked, because a start of the interpreter costs more than a save. Prints one JSON object a case.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec.config
import torch
import torch.distributed as dist

from pipeline.checkpoint import direct_io, load, retention, snapshot
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.distributed import World
from pipeline.supervision import fault_points

RANKS, NUMEL = 2, 3000
snapshot.FILE_BYTES, direct_io.PIECE_BYTES = 4 * NUMEL, 8192  # several files a rank, several pieces a file
fsspec.config.conf["local"] = {"auto_mkdir": True}  # as a store has no folders
SHAPES = {name: [RANKS * NUMEL] for name in ("a", "b")}
FACTS: dict[str, Any] = {
    "samples": 0,
    "num_updates": 0,
    "shapes": SHAPES,
    "config": {},
    "config_digest": "",
    "dataset": {},
    "classes": [],
    "evaluation": {},
}


def fragments(step: int, rank: int) -> dict[str, torch.Tensor]:
    part = torch.arange(NUMEL) + rank * NUMEL
    return {f"weights/{name}@{rank * NUMEL}": (part * step).float() for name in SHAPES}


def place(folder: Path, point: str) -> str:
    """A local folder, or for the points of an upload the same folder as an object store, which takes whole files only."""
    return f"local://{folder}" if point.startswith("upload") else str(folder)


def saver(run_dir: str, rank: int, size: int = RANKS) -> Saver:
    world = World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))
    taken = retention.folder_names(run_dir) if rank == 0 else set()
    return Saver(run_dir, config=SavingConfig(max_wait_s=0.3), policy=Policy(last=1), world=world, taken=taken)


def rank_main(folder: Path, rank: int, point: str, call: int, victim: int) -> None:
    dist.init_process_group("gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=RANKS)
    with saver(place(folder, point), rank) as mine:
        for step in (1, 2, 3):
            if step == 3 and rank == victim:
                arm(point, call)
            mine.save(step=step, fragments=fragments(step, rank), facts=FACTS, final=step < 3)
        mine.settle()


def arm(point: str, call: int) -> None:
    """Die when the point is reached for the call-th time; "named X" lies just before X gets its name."""
    seen = []

    def reach(reached: str) -> None:
        seen.append(reached)
        if seen.count(point) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def replacing(source: Any, target: Any) -> None:
        reach(f"named {str(target).rsplit('/', 1)[-1].split('-')[0]}")
        replace(source, target)

    fault_points.hook, os.replace = reach, replacing


def case(folder: Path, point: str, call: int, victim: int) -> dict[str, Any]:
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the survivor says that its peer is gone
                rank_main(folder, rank, point, call, victim)
            finally:
                os._exit(0)
        pids.append(pid)
    _, status = os.waitpid(pids[victim], 0)
    was_killed = os.WIFSIGNALED(status)
    other, deadline_s = pids[1 - victim], time.monotonic() + 1.0
    while os.waitpid(other, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline_s:  # as the launcher does with those that are left
            os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    cache = str(folder / "cache")
    found, passed = load.newest(place(folder, point), cache)
    step = found.step if found else None
    state = load.load_state(found, cache)["weights"] if found else {}
    whole = torch.arange(RANKS * NUMEL) * (step or 0)
    with saver(place(folder, point), 0, size=1) as again:  # the next attempt reaches the same step, on one rank
        everything = {f"weights/{n}@0": (torch.arange(RANKS * NUMEL) * 3).float() for n in SHAPES}
        again.save(step=3, fragments=everything, facts=FACTS, final=True)
    then, passed_then = load.newest(place(folder, point), cache)
    return {
        "case": [point, call, victim],
        "was_killed": was_killed,
        "found": step,
        "is_equal": bool(state) and all(torch.equal(t, whole.float()) for t in state.values()),
        "num_passed_over": len(passed) + len(passed_then),
        "found_then": then.step if then else None,
        "folders_then": len(list((folder / "checkpoints").iterdir())),
    }


def main() -> None:
    torch.set_num_threads(1)
    for point, call, victim in json.loads(sys.argv[1]):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(case(Path(folder), point, call, victim)), flush=True)


if __name__ == "__main__":
    main()
