"""Run by test_train.py: iterates the loop; appends each record to a file; can die or stop itself at a step."""

import json
import os
import signal
import sys

import torch

from pipeline.config import load_yaml
from pipeline.train import train
from pipeline.world import leave


def main() -> None:
    recipe, out, log, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    with open(recipe) as file:
        run = load_yaml(file.read(), recipe)
    rank = int(os.environ.get("RANK", "0"))
    for record in train(run, out):
        if rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(record.as_dict()) + "\n")
        if record.step == options.get("kill_at") and type(record).__name__ == "Step":
            os.kill(os.getpid(), signal.SIGKILL)
        if record.step == options.get("stop_at") and rank == options.get("stop_rank", 0):
            os.kill(os.getpid(), signal.SIGTERM)
    leave()


if __name__ == "__main__":
    main()
