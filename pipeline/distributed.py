"""Which process this is, of how many, on which device: one value, asked for once; and what ranks tell each other."""

import collections
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from nfnet.kernels import cpu
from pipeline import places
from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.exchange import local_connections, objects, unix_store
from pipeline.supervision.rank_environment import place

T = TypeVar("T")
R = TypeVar("R")

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer than this for the others ends with an error instead of hanging."""
_store: dist.Store | None = None


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
"""Of a process that asks no other."""


def allow_tf32(allowed: bool) -> None:
    """Whether this process's GPU rounds the factors of fp32 products. torch's default does in convolutions alone."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def join() -> World:
    """This process's place in the process group that the launcher's variables describe (`place`), joining it.

    A process that was started alone makes a group of its own in its memory: no port and no file is taken, so any number of
    single-process runs (trials of a sweep) live on one machine. gloo without a GPU, NCCL with one.
    """
    has_gpu = torch.cuda.is_available()
    objects.admit_data_alone()
    allow_tf32(False)  # fp32 is fp32, for whoever evaluates; an engine says otherwise where its run does
    if not dist.is_initialized():
        for folder in {tempfile.gettempdir(), places.socket_folder()}:
            places.remove_leftovers(folder)
        here = place()
        if here.overlooked:
            print(terminal(f"normfree: {here.overlooked}"), file=sys.stderr)
        # DeepSpeed reads these itself, and refuses to start without the last.
        os.environ.update(RANK=str(here.rank), WORLD_SIZE=str(here.size), LOCAL_RANK=str(here.local_rank))
        backend = "gloo" if uses_gloo() else "nccl"
        store = dist.PrefixStore("default_pg", _group_store(here.size))
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=COLLECTIVE_TIMEOUT)
        local_connections.refuse_strangers(here.size)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=device)


def meeting_point() -> dist.Store:
    """The key-value store through which the ranks find each other, also before there is a process group. One a process.

    That of the launcher, else of rank 0's process, which must not end before the others have read what they need.
    """
    global _store
    if _store is not None:
        return _store
    here = place()
    if here.size > 1 and (folder := os.environ.get(unix_store.FOLDER)):
        _store = unix_store.UnixStore(folder, wait_s=COLLECTIVE_TIMEOUT.total_seconds())
    elif dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    elif here.size == 1:
        _store = dist.HashStore()
    else:
        _store, *_ = next(dist.rendezvous("env://", here.rank, here.size, timeout=COLLECTIVE_TIMEOUT))
        _store.set_timeout(COLLECTIVE_TIMEOUT)
    return _store


def _group_store(size: int) -> dist.Store:
    """In which process groups are made, by threads of torch too: one of torch's own."""
    folder = os.environ.get(unix_store.FOLDER) if size > 1 else None
    return dist.FileStore(os.path.join(folder, unix_store.GROUPS), size) if folder else meeting_point()


def uses_gloo() -> bool:
    return not torch.cuda.is_available()


def devices(local_rank: int) -> str:
    """What this host computes with, in words that are equal on hosts which compute alike.

    Raises:
        UserError: it has GPUs, and none for this rank.
    """
    if not torch.cuda.is_available():
        loops = "plain torch" if cpu.problem else "compiled loops"
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}, {loops}"
    names = collections.Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    found = " and ".join(f"{count} x {name}" for name, count in sorted(names.items()))
    if local_rank >= sum(names.values()):
        raise UserError(
            f"process {local_rank + 1} of this host has no GPU: it has {found}; start fewer processes a host, or mend the host "
            "('normfree doctor')"
        )
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = f"CPU ({os.cpu_count()} cores, {torch.get_num_threads()} threads) on {socket.gethostname()}"
    return f"{text}; {cpu.problem}, and until then a step takes a third longer" if cpu.problem else text


def broadcast(world: World, value: T) -> T:
    """Rank 0's value on every rank: the way in which anything that one rank found out is agreed."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(world: World, work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; a UserError of it too."""
    found: T | UserError | None = None
    if world.is_main:
        try:
            found = work()
        except UserError as error:
            found = error
    found = broadcast(world, found)
    if isinstance(found, UserError):
        raise found
    return cast(T, found)


def together(world: World, work: Callable[[], T]) -> T:
    """What `work` gives on each rank; if it raises a UserError on any of them, all raise the first one's."""
    found: object = None
    try:
        found = work()
    except UserError as error:
        found = error
    failed = gather(world, (socket.gethostname(), str(found)) if isinstance(found, UserError) else None)
    if any(failed):
        host, reason = next(f for f in failed if f)
        raise UserError(reason if failed[0] else f"{reason} (found on {host})")
    return cast(T, found)


def gather(world: World, value: T) -> list[T]:
    """Every rank's value on every rank, by rank. A collective: all ranks call it, or none does."""
    if world.size == 1:
        return [value]
    box = cast(list[T], [None] * world.size)
    dist.all_gather_object(box, value)
    return box


def ask_main(world: World, value: T, work: Callable[[list[T]], list[R]]) -> R:
    """What rank 0's `work` makes for this rank, of every rank's value; a UserError of it reaches all. A collective.

    Where values grow with the ranks this is the way: no rank but 0 hears more than its own answer.
    """
    if world.size == 1:
        return work([value])[0]
    heard = cast(list[T], [None] * world.size) if world.is_main else None
    dist.gather_object(value, heard, dst=0)
    answers: list[R | UserError] = []
    if heard is not None:
        try:
            answers = [*work(heard)]
        except UserError as error:
            answers = [error] * world.size
    box: list[R | UserError | None] = [None]
    dist.scatter_object_list(box, answers, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    return cast(R, box[0])


def leave() -> None:
    """End the process group of a run that is over. Without it, gloo's threads may abort a process that exits well."""
    global _store
    _store = None
    if dist.is_initialized():
        dist.destroy_process_group()
