"""How far this rank is among the collectives that all ranks enter in the same order: its main thread, and its device.

With gloo the main thread waits inside a collective, so that the ranks which others wait for have entered fewer. With NCCL it
only queues one: all ranks may have entered the same number while the device of one hangs before the next. What the devices
have begun is in NCCL's flight recorder, if it takes times (`record_starts`).
"""

import json
import os
from typing import Any

import torch.distributed as dist


def record_starts() -> None:
    """Before the process group is made: NCCL's flight recorder keeps the newest collectives, and sees when they begin."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")


def entered() -> int:
    """By this rank, over all groups: the ranks that a collective waits for have entered fewer than those that wait in it."""
    if not dist.is_initialized():
        return 0
    groups = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]


def begun() -> int | None:
    """By this rank's device; None where nothing tells (gloo)."""
    if not dist.is_initialized() or not dist.is_nccl_available() or dist.get_backend() != "nccl":
        return None
    from torch._C._distributed_c10d import _dump_nccl_trace_json  # type: ignore[attr-defined]

    try:
        return newest_begun(json.loads(_dump_nccl_trace_json(includeCollectives=True, onlyActive=False)))
    except (RuntimeError, ValueError):  # no record, or one that is being written
        return None


def newest_begun(record: dict[str, Any]) -> int | None:
    """Of a flight record: the sum over the groups of the number of their newest collective that a device has begun."""
    newest: dict[Any, int] = {}
    for entry in record.get("entries", ()):
        if entry.get("state") in ("started", "completed") and not entry.get("is_p2p", False):
            group = str(entry.get("process_group"))
            newest[group] = max(newest.get(group, 0), int(entry["collective_seq_id"]))
    return sum(newest.values()) if newest else None
