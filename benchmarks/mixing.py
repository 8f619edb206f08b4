"""How well an order mixes: lanes beside a full shuffle, our windowed order, and py1e of mosaicml-streaming at the same window.

1,720,320 samples of 1,000 classes in shards of 640, sorted by class as they were written or shuffled; batches of 1,024, ten
epochs. As many samples are open at once in lanes as in py1e. Printed for each order, as the mean over epochs and its range:

- excess: variance of class counts in a batch over that of a random draw (1 = as a full shuffle);
- classes: different ones in a batch;
- neighbours: of a thousand pairs of samples that lie next to each other in a shard, those that meet in one batch.

The peer is skipped, saying so, where it is not installed: pip install --no-deps mosaicml-streaming.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import numpy as np

from pipeline.data.sampling.lanes import LaneOrder, choose_layout
from pipeline.data.sampling.order import Order, cut_blocks

NUM, SHARD, CLASSES, BATCH, EPOCHS = 1_720_320, 640, 1000, 1024, 10
BLOCK, LANES, WINDOW, NODES = 64, 32, 16, 8
"""Samples a block, lanes, blocks of a lane that are open; the peer's canonical nodes."""
BYTES = 100_000
"""Of a sample."""
Epoch = Callable[[int], np.ndarray]
"""Number of an epoch -> (NUM,) its samples in order."""


def _peer() -> Epoch | None:
    """py1e with a shuffle block that holds, over its nodes, what is open in our lanes."""
    found = importlib.util.find_spec("streaming")
    if found is None or not found.submodule_search_locations:
        return None
    for name, folder in (("streaming", ""), ("streaming.base", "/base"), ("streaming.base.shuffle", "/base/shuffle")):
        package = types.ModuleType(name)  # its own __init__ wants cloud clients and transformers
        package.__path__ = [found.submodule_search_locations[0] + folder]
        sys.modules[name] = package
    shuffle = importlib.import_module("streaming.base.shuffle.py1e").get_shuffle_py1e
    sizes, block = np.full(NUM // SHARD, SHARD), LANES * WINDOW * BLOCK // NODES
    # A global batch takes equally many samples of each canonical node.
    return lambda epoch: shuffle(sizes, NODES, 0, epoch, block).reshape(NODES, -1).T.ravel()


def _orders() -> dict[str, Epoch]:
    layout = choose_layout(NUM, block_samples=BLOCK, lanes=LANES, window=WINDOW, batch=BATCH)
    assert layout is not None
    lanes = LaneOrder(layout, 0)
    shards, places = np.divmod(np.arange(NUM), SHARD)
    windowed = Order(cut_blocks(shards, places * BYTES, BLOCK * BYTES), 0, mix_blocks=LANES * WINDOW)
    found: dict[str, Epoch] = {
        "full shuffle": lambda epoch: np.random.default_rng(epoch).permutation(NUM),
        f"lanes, {LANES} x {WINDOW} blocks of {layout.block_samples}": lambda e: lanes.positions(e * NUM, NUM)[1],
        f"windowed, {LANES * WINDOW} blocks of {BLOCK}": lambda e: windowed.positions(e * NUM, NUM)[1],
    }
    peer = _peer()
    if peer is None:
        print("mosaicml-streaming is not installed: py1e is skipped")
    else:
        found[f"py1e, {NODES} nodes x {LANES * WINDOW * BLOCK // NODES}"] = peer
    return found


def _measures(order: np.ndarray, classes: np.ndarray) -> tuple[float, float, float]:
    """Excess, classes a batch, neighbours a thousand."""
    batches = order.reshape(-1, BATCH)
    batch_of = np.empty(NUM, np.int64)
    batch_of[batches.ravel()] = np.repeat(np.arange(len(batches)), BATCH)
    counts = np.bincount(batch_of * CLASSES + classes, minlength=len(batches) * CLASSES).reshape(-1, CLASSES)
    share = np.bincount(classes, minlength=CLASSES) / NUM
    drawn = BATCH * share * (1 - share) * (NUM - BATCH) / (NUM - 1)  # hypergeometric: without replacement
    excess = ((counts - BATCH * share) ** 2).mean() / drawn.mean()
    same_shard = np.arange(NUM - 1) // SHARD == np.arange(1, NUM) // SHARD
    meet = (batch_of[:-1] == batch_of[1:])[same_shard].mean()
    return float(excess), float((counts > 0).sum(1).mean()), float(meet * 1000)


def main() -> None:
    print(f"{NUM:,} samples, {CLASSES} classes, shards of {SHARD}, batches of {BATCH}, {EPOCHS} epochs")
    sorted_classes = np.arange(NUM) * CLASSES // NUM
    written = {"sorted by class": sorted_classes, "shuffled": np.random.default_rng(7).permutation(sorted_classes)}
    for name, epoch in _orders().items():
        orders = [epoch(e) for e in range(EPOCHS)]
        assert all(np.array_equal(np.sort(order), np.arange(NUM)) for order in orders), name
        for how, classes in written.items():
            values = np.array([_measures(order, classes) for order in orders])
            excess, num, meet = (f"{v.mean():.2f} ({v.min():.2f}-{v.max():.2f})" for v in values.T)
            print(f"  {name:<36} {how:<16} excess {excess}  classes {num}  neighbours {meet}")
    print(f"  sorted, by the law: at most {1 + BATCH / (LANES * WINDOW):.2f} in lanes")


if __name__ == "__main__":
    main()
