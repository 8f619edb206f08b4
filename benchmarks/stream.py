"""Training batches from an S3 server on loopback against the same shards on disk, in turn, after the first second.

python -m benchmarks stream            NORMFREE_BENCH_SOURCE=photos.tar: real images; else an embedded set
"""

import importlib.util
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.turns import hardware
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.benchmark import bare_read, measure
from pipeline.data.loading.datasets import DataConfig
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.storage import objects

PX, BATCH, SECONDS, ROUNDS = 224, 32, 4.0, 3


def _server(folder: Path):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("s3_server", Path(__file__).parents[1] / "tests" / "s3_server.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.s3_server(folder)


def main() -> None:
    source = os.environ.get("NORMFREE_BENCH_SOURCE")
    card = Path(source).stem if source else "glyphs"
    with tempfile.TemporaryDirectory(prefix="normfree-stream-") as scratch, _server(Path(scratch)) as environment:
        os.environ.update(environment)
        local, remote = str(Path(scratch) / "data-set"), "s3://bucket/data-set"
        prepare(load_card(card), local, source=source, max_bad_share=0.5)
        for path in Path(local).iterdir():
            objects.put_file(path, objects.join(remote, path.name))
        configs = {
            "disk": DataConfig(url=local),
            "S3": DataConfig(url=remote, cache_gb=0.0),
            "S3, cache empty at first": DataConfig(url=remote, cache_dir=f"{scratch}/cache"),
        }
        print({name: f"{bare_read(c, seconds=2.0).mb_per_s:.0f} MB/s bare" for name, c in configs.items()})
        rates: dict[str, list[float]] = {name: [] for name in configs}
        for number in range(ROUNDS):
            for name, config in configs.items():
                config = replace(config, cache_dir=f"{scratch}/cache-{number}")  # empty: what the first epoch sees
                rate = measure(config, AugmentConfig(image_px=PX), num_workers=0, batch=BATCH, seconds=SECONDS)
                rates[name].append(rate.images_per_s)
    for name in ("S3", "S3, cache empty at first"):
        ratios = sorted(a / b for a, b in zip(rates[name], rates["disk"], strict=True))
        print(
            f"{card}, {PX} px, one process: {name} {statistics.median(rates[name]):.0f} images/s, disk "
            f"{statistics.median(rates['disk']):.0f}, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f})  [{hardware()}]"
        )
