"""Run by test_stream.py: prints the numbers of the samples of eleven batches; knows the store by its environment."""

import json
import sys

import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.distributed import World


def main() -> None:
    url, cache, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    config = DataConfig(url=url, block_mb=0.03, num_workers=options["workers"], cache_dir=cache)
    data = TrainData(config, AugmentConfig(image_px=8), seed=0)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    for batch in data.batches(steps=range(11), global_batch=100, micro_batch=100, world=world):
        assert not batch.lost and not batch.notice
        print(*batch.samples.tolist())


if __name__ == "__main__":
    main()
