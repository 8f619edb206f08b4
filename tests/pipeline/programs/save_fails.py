"""Run by test_saver.py in two processes: the disk of rank 1 is full during the second of three saves."""

import errno
import json
import os
import sys

import torch

from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver
from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.distributed import join, leave
from pipeline.supervision import fault_points
from pipeline.supervision.process_exit import end

NUMEL = 1000
FACTS = {"samples": 0, "num_updates": 0, "shapes": {"a": [2 * NUMEL]}, "config": {}, "config_digest": ""}


def full(point: str) -> None:
    if point == "file piece":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main() -> None:
    me = join()
    saver = Saver(sys.argv[1], config=SavingConfig(), policy=Policy(), world=me, taken=set())
    facts = {**FACTS, "dataset": {}, "classes": [], "evaluation": {}}
    newest, records = [me.rank], []
    for step in (1, 2, 3):
        fault_points.hook = full if step == 2 and me.rank == 1 else None
        part = {f"weights/a@{me.rank * NUMEL}": torch.full((NUMEL,), float(step))}
        records += saver.save(step=step, fragments=part, facts=facts, final=True)
        newest.append(saver.newest_step)
    sys.stdout.write("".join(json.dumps(line) + "\n" for line in [*(r.as_dict() for r in records), {"newest": newest}]))
    leave()


if __name__ == "__main__":
    main()
    end(0)
