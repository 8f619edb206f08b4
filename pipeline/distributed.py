"""Which process this is, of how many, on which device: one value, asked for once."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nfnet.kernels import cpu
from pipeline.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer than this for the others ends with an error instead of hanging."""


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the environment says of this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    overlooked: str = ""
    """What stands there without a launcher, in a sentence."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """Who this process is, of how many: the only reader of the variables by which launchers say it.

    A launcher sets all of `RANK_VARIABLES`. Without a WORLD_SIZE above 1 a process is alone, whatever else was left in its
    environment.

    Raises:
        UserError: WORLD_SIZE says that there are several processes, and the rest is missing or has no meaning: to go on alone
            could be several runs in one folder.
    """
    given = {name: os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").strip()}
    stated = ", ".join(f"{name}={text}" for name, text in given.items())
    size = _number("WORLD_SIZE", given, 1, stated)
    if size == 1:
        odd = [name for name in ("RANK", "LOCAL_RANK") if given.get(name, "0") != "0"]
        text = f"{' and '.join(odd)} set, WORLD_SIZE not above 1: this process runs alone" if odd else ""
        return Place(overlooked=text)
    missing = [name for name in RANK_VARIABLES if name not in given]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set to {size}, but no launcher is there ({', '.join(missing)} not set): unset WORLD_SIZE and RANK, "
            "or start with torchrun or --num-processes"
        )
    rank, local_rank = (_number(name, given, 0, stated) for name in ("RANK", "LOCAL_RANK"))
    if rank >= size or local_rank > rank or _number("MASTER_PORT", given, 1, stated) > 65535:
        raise UserError(
            f"the variables of a launcher contradict each other ({stated}): unset them, or start with torchrun or "
            "--num-processes"
        )
    return Place(rank=rank, size=size, local_rank=local_rank)


def _number(name: str, given: dict[str, str], least: int, stated: str) -> int:
    text = given.get(name, "1").strip()
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise UserError(
            f"{name} is {text!r}, which is no whole number from {least} on ({stated}): unset it and the other variables of a "
            "launcher, or start with torchrun or --num-processes"
        )
    return int(text)


def join() -> World:
    """This process's place in the process group that the launcher's variables describe (`place`), joining it.

    A process that was started alone makes a group of its own over a temporary file: no port is taken, so any number of
    single-process runs (trials of a sweep) live on one machine. gloo without a GPU, NCCL with one.
    """
    has_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        here = place()
        if here.overlooked:
            print(f"normfree: {here.overlooked}", file=sys.stderr)
        # DeepSpeed reads these itself, and refuses to start without the last.
        os.environ.update(RANK=str(here.rank), WORLD_SIZE=str(here.size), LOCAL_RANK=str(here.local_rank))
        backend = "nccl" if has_gpu else "gloo"
        if here.size > 1:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        else:
            meeting_point = Path(tempfile.mkdtemp(prefix="normfree-group-")) / "store"
            dist.init_process_group(backend, init_method=meeting_point.as_uri(), rank=0, world_size=1)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = f"CPU ({os.cpu_count()} cores, {torch.get_num_threads()} threads) on {socket.gethostname()}"
    return f"{text}; {cpu.problem}, and until then a step takes a third longer" if cpu.problem else text


def broadcast(world: World, value: object) -> object:
    """Rank 0's value on every rank: the way in which anything that one rank found out is agreed."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(world: World, value: object) -> list[object]:
    """Every rank's value on every rank, by rank. A collective: all ranks call it, or none does."""
    if world.size == 1:
        return [value]
    box: list[object] = [None] * world.size
    dist.all_gather_object(box, value)
    return box


def leave() -> None:
    """End the process group of a run that is over. Without it, gloo's threads may abort a process that exits well."""
    if dist.is_initialized():
        dist.destroy_process_group()
