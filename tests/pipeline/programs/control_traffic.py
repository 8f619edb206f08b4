"""What ranks tell each other besides gradients, on torch's fake process group of as many ranks as argv names, in turn."""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline import distributed
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.distributed import World
from tests.pipeline.programs.planned_steps import Collectives


def traffic(size: int, folder: str) -> dict[str, dict[str, list[int]]]:
    """Kind -> [bytes, calls] of a word of each rank, of rank 0's word, and of the agreements of a save."""
    os.environ.update(RANK="0", WORLD_SIZE=str(size), LOCAL_RANK="0")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    world = World(rank=0, size=size, local_rank=0, device=torch.device("cpu"))
    found = {}
    with Collectives() as seen:
        distributed.gather(world, "x" * 1000)
    found["gather"] = seen.sums()
    with Collectives() as seen:
        distributed.broadcast(world, "x" * 1000)
    found["broadcast"] = seen.sums()
    saver = Saver(folder, config=SavingConfig(), policy=Policy(last=1), world=world, taken=set())
    with Collectives() as seen:
        _, _, writers = saver._agree(7, True)
    assert len(writers) == size
    found["save"] = seen.sums()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    with TemporaryDirectory(prefix="normfree-traffic-") as place:
        print(json.dumps({size: traffic(int(size), str(Path(place) / size)) for size in sys.argv[1:]}))
