"""Which process this is, of how many, on which device: one value, asked for once."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nfnet.kernels import cpu
from pipeline import places

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer than this for the others ends with an error instead of hanging."""


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join() -> World:
    """This process's place, joining the process group that the launcher's variables (RANK, WORLD_SIZE, ...) describe.

    A process that was started alone makes a group of its own in its memory: no port and no file is taken, so any number of
    single-process runs (trials of a sweep) live on one machine. gloo without a GPU, NCCL with one.
    """
    has_gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        for folder in {tempfile.gettempdir(), places.socket_folder()}:
            places.remove_leftovers(folder)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it
        backend = "nccl" if has_gpu else "gloo"
        if size > 1:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
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
