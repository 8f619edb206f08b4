"""All-reduces of growing sizes over all hosts, with the backend of training: `start` on each host, ranks as its children.

python -P -m orchestration.doctor.sweep MEGABYTES      one rank, by the variables of a launcher; rank 0 prints the times
"""

import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta

from orchestration import child_process
from orchestration.doctor.messages import MARK, MAX_BYTES, REMEDY, Sweep
from pipeline import documents

LIMIT_S = 120.0
MEET_S = 45.0
REPEATS = 5
SLOW_S = 1.0
"""No larger size follows one that takes longer."""
SIZES = tuple(1024 * 8**i for i in range(7))
"""1 KiB to 256 MiB; on a CPU not the last."""


def run(*, address: str, port: int, first_rank: int, num_local: int, num_ranks: int, interface: str = "") -> Sweep:
    """This host's ranks of a sweep, started and awaited; times where rank 0 is here.

    Args:
        address, port: of rank 0's host, where its first process keeps the store.
        interface: the one between the hosts, for gloo and NCCL; "" = their choice.
    """
    shared = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1"}
    if interface:
        shared |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    with tempfile.TemporaryFile() as output:
        ranks = [
            child_process.start(
                "orchestration.doctor.sweep",
                environment={**shared, "RANK": str(first_rank + i), "LOCAL_RANK": str(i)},
                output=output,
            )
            for i in range(num_local)
        ]
        codes = _wait(ranks)
        output.seek(0)
        text = output.read(MAX_BYTES).decode("utf-8", "replace")
    for line in text.splitlines():
        if line.startswith(f'{{"{MARK}":'):
            return documents.convert(documents.parse_json(line, "a sweep")[MARK], Sweep, "a sweep", remedy=REMEDY)
    if any(codes) or first_rank == 0:
        last = (text.strip().splitlines() or ["it did not end in time"])[-1]
        return Sweep(num_ranks=num_ranks, error=last[:500])
    return Sweep(num_ranks=num_ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int]:
    deadline_s = time.monotonic() + LIMIT_S
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.wait() for rank in ranks]


def main() -> int:
    import json
    from dataclasses import asdict

    import torch
    import torch.distributed as dist

    from pipeline import distributed
    from pipeline.supervision.rank_environment import place

    local_rank = place().local_rank
    is_gloo = distributed.uses_gloo()
    if not is_gloo:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo" if is_gloo else "nccl", timeout=timedelta(seconds=MEET_S))
    device = torch.device("cpu") if is_gloo else torch.device("cuda", local_rank)
    seconds: dict[str, float] = {}
    for size in SIZES[:-1] if is_gloo else SIZES:
        values = torch.zeros(size // 4, device=device)
        spent = []
        for _ in range(REPEATS + 1):
            begin_s = time.perf_counter()
            dist.all_reduce(values)
            if not is_gloo:
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - begin_s)
        slowest = torch.tensor([statistics.median(spent[1:])], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds[str(size)] = float(slowest)
        if float(slowest) > SLOW_S:
            break
    if dist.get_rank() == 0:
        found = Sweep(backend=dist.get_backend(), num_ranks=dist.get_world_size(), seconds=seconds)
        print(json.dumps({MARK: asdict(found)}), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
