"""Run by tests: iterates the loop; appends each record to a file; can die or stop itself at a step.

A UserError ends up in a file of each rank, with the last step it saw.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch

import pipeline.training.train
from pipeline.data.loading.datasets import Batch, TrainData
from pipeline.distributed import leave
from pipeline.errors import UserError
from pipeline.profiling.asked import parse
from pipeline.records import Record
from pipeline.supervision.process_exit import end
from pipeline.training.run import load_yaml
from pipeline.training.train import train


def main() -> None:
    recipe, out, log, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    with open(recipe) as file:
        run = load_yaml(file.read(), recipe)
    rank = int(os.environ.get("RANK", "0"))
    poison(set(options.get("poison", [])))
    last = -1
    try:
        for record in train(run, out, profile=parse(options.get("profile", ""))):
            last = record.step
            _read(record, rank, log, options)
    except UserError as error:
        with open(f"{log}.rank{rank}", "w") as file:
            file.write(json.dumps([last, str(error)]))
    leave()


def poison(numbers: set[int]) -> None:
    """Micro-batches with one of these samples, by their numbers in the run, become NaN on the device."""
    batches, plain = TrainData.batches, pipeline.training.train.normalise

    def watched(self: TrainData, **kwargs: Any) -> Iterator[Batch]:
        for batch in batches(self, **kwargs):
            batch.images.is_poisoned = bool(numbers & set(batch.samples.tolist()))
            yield batch

    def normalise(images: torch.Tensor, *rest: Any) -> torch.Tensor:
        return plain(images, *rest) * (float("nan") if images.is_poisoned else 1.0)

    TrainData.batches, pipeline.training.train.normalise = watched, normalise  # type: ignore[method-assign, assignment]


def _read(record: Record, rank: int, log: str, options: dict[str, Any]) -> None:
    if rank == 0:
        with open(log, "a") as file:
            file.write(json.dumps(record.as_dict()) + "\n")
    if record.step == options.get("kill_at") and type(record).__name__ == "Step":
        os.kill(os.getpid(), signal.SIGKILL)
    if record.step == options.get("stop_at") and rank == options.get("stop_rank", 0):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
    end(0)
