"""Batches of datasets: training batches in the order of `pipeline.data.sampling.order`, evaluation batches each sample once.

    manifests -> pools of samples -> Mixture of Orders -> draws (source, sample, view) -> read ahead -> pixels -> uint8 batch

What is drawn at a step is computed, not remembered, so the whole state of the data is one integer, the samples consumed.
Loader processes are functions of that integer too: their number changes nothing but speed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format import label_sets
from pipeline.data.format.index import SplitIndex
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.batches import Batch, BatchStream, Change, Pixels, Sources, UnreadableSample
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.loading.loader_processes import load
from pipeline.data.loading.make_order import by_class, choose_order, make_cache, make_order, pool_of, united
from pipeline.data.loading.prefetch import places_of
from pipeline.data.loading.shard_faults import look_at_shards, refuse_faults
from pipeline.data.loading.shard_reader import ShardReader
from pipeline.data.sampling.lanes import LaneLayout
from pipeline.data.sampling.mixture import Mixture
from pipeline.data.sampling.order import rank_share
from pipeline.data.sampling.subset import Subset
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.storage import objects

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(sources, samples, views), int64 of one shape; samples by the source's index, `view // repeats` is the epoch of the source."""

__all__ = ["Batch", "DataConfig", "EvalData", "TrainData", "UnreadableSample"]


class TrainData:
    """The training datasets of a run: their size, and their micro-batches from any step on."""

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        global_batch: int = 0,
        world: World | None = None,
    ) -> None:
        """`global_batch`: of the run; needed for lanes only. `world`: the main rank looks at the shards for all of them."""
        self.config = config
        self._augment, self._seed = augment, seed
        sources = united(config)
        self.manifests, self.indices = [m for _, m, _ in sources], [i for *_, i in sources]
        self.manifest, self.index = self.manifests[0], self.indices[0]
        self.names = [f"{i.url} ({i.name})" if "+" in config.train_split else i.url for i in self.indices]
        """Of the sources, in accounts."""
        self.pools = [pool_of(m, i, config.subset) for m, i in zip(self.manifests, self.indices, strict=True)]
        self.layouts = [
            choose_order(config, index, distinct=self.distinct(global_batch)) if config.order == "lanes" else None
            for index in self.indices
        ]
        readers = [_reader(config, index, layout) for index, layout in zip(self.indices, self.layouts, strict=True)]
        self.faults = look_at_shards(readers, world)
        # Class names of all sources, the first one's first.
        sets = list(dict.fromkeys(name for manifest in self.manifests for name in manifest.classes))
        labels = label_sets.common_labels([(m.url, m.labels) for m in self.manifests])
        self.classes = list(labels or sets)
        """What the network has a logit for: the labels where an image has several."""
        self.label_table = _table(sets, labels)
        self.sources = _sources(readers, self.manifests, sets)
        orders = [
            make_order(config, index, pool, layout, seed if source == 0 else seed + (source << 32))
            for source, (index, pool, layout) in enumerate(zip(self.indices, self.pools, self.layouts, strict=True))
        ]
        self.mixture = Mixture(orders, [weight for weight, *_ in sources])
        self.lost_allowed = config.lost_allowed(self.num_samples)
        refuse_faults(self.faults, self.lost_allowed)

    @property
    def num_samples(self) -> int:
        """Different samples of all sources together."""
        return self.mixture.num_samples

    @property
    def samples_per_epoch(self) -> int:
        """Positions of an epoch: each sample `repeats` times."""
        return self.num_samples * self.config.repeats

    @property
    def digest(self) -> str:
        """Of the data as a whole: the manifest's where there is one source."""
        return "+".join(dict.fromkeys(manifest.digest for manifest in self.manifests))

    def draw(self, step: int, global_batch: int) -> Drawn:
        """What all ranks draw at the run's step, (global_batch,).

        With repeats the batch's different samples come one after another, then all of them again, so that copies lie in
        different micro-batches.
        """
        repeats, distinct = self.config.repeats, self.distinct(global_batch)
        start = self.config.data_step(step) * distinct
        if self.mixture.has_lanes:
            sources, epochs, samples = self.mixture.by_lane(start, distinct, slice(None))
        else:
            sources, epochs, samples = self.mixture.positions(start, distinct)
        samples = self._of_pools(sources, samples)
        if self.config.order == "correlated":
            sources, epochs, samples = by_class(self.sources, sources, epochs, samples)
        views = np.concatenate([epochs * repeats + copy for copy in range(repeats)])
        return np.tile(sources, repeats), np.tile(samples, repeats), views

    def draw_share(self, step: int, global_batch: int, *, rank: int, num_ranks: int, micro_batch: int) -> Drawn:
        """What one rank draws at the run's step, (accumulation, micro_batch).

        With lanes a rank has a contiguous part of the batch sorted by lane, cut into micro-batches that are the same for any
        number of ranks; copies of a sample lie in neighbouring micro-batches.
        """
        if not self.mixture.has_lanes:
            share = {"rank": rank, "num_ranks": num_ranks, "micro_batch": micro_batch}
            sources, samples, views = (rank_share(a, **share) for a in self.draw(step, global_batch))
            return sources, samples, views
        repeats, distinct = self.config.repeats, self.distinct(global_batch)
        if distinct % micro_batch:
            raise UserError(
                f"micro_batch {micro_batch} does not divide the {distinct} different samples of a global batch, as "
                f"data.order lanes needs; set it to a divisor"
            )
        accumulation = global_batch // (num_ranks * micro_batch)
        numbers = np.arange(rank * accumulation, (rank + 1) * accumulation)
        parts, copies = numbers // repeats, numbers % repeats
        chosen = slice(int(parts[0]) * micro_batch, (int(parts[-1]) + 1) * micro_batch)
        sources, epochs, samples = self.mixture.by_lane(self.config.data_step(step) * distinct, distinct, chosen)
        rows = ((parts - parts[0]) * micro_batch)[:, None] + np.arange(micro_batch)
        return sources[rows], self._of_pools(sources, samples)[rows], epochs[rows] * repeats + copies[:, None]

    def micro_batch_number(self, micro: int, world: World, accumulation: int) -> int:
        """Among all micro-batches of a step, that of this rank's `micro`-th: decides its dropout."""
        return world.rank * accumulation + micro if self.mixture.has_lanes else micro * world.size + world.rank

    def _of_pools(self, sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Places in the pools of the sources -> numbers in their indices."""
        for source, pool in enumerate(self.pools):
            if isinstance(pool, np.ndarray):
                mine = sources == source
                samples[mine] = pool[samples[mine]]
        return samples

    def numbers(self, step: int, global_batch: int) -> np.ndarray:
        """(global_batch,) int64: numbers of the samples of a step, as `Batch.samples` has them."""
        sources, samples, _ = self.draw(step, global_batch)
        return np.asarray(self.sources.firsts)[sources] + samples

    def distinct(self, global_batch: int) -> int:
        """Different samples in a global batch."""
        if global_batch % self.config.repeats:
            raise UserError(
                f"global_batch {global_batch} does not hold whole samples of {self.config.repeats} copies each; "
                f"set it to a multiple of data.repeats"
            )
        return global_batch // self.config.repeats

    def keys(self, step: int, global_batch: int) -> list[tuple[int, int, str, str]]:
        """(source, epoch, shard, key) of each different sample of a step."""
        distinct = self.distinct(global_batch)
        places = places_of(*(a[:distinct] for a in self.draw(step, global_batch)))
        return [(p.source, p.view // self.config.repeats, self.sources.shard(p), self.sources.key(p)) for p in places]

    def key(self, number: int) -> str:
        """Key of a sample by its number in `Batch.samples`."""
        source = int(np.searchsorted(self.sources.firsts, number, side="right")) - 1
        return str(self.indices[source].keys[number - self.sources.firsts[source]])

    def batches(self, *, steps: range, global_batch: int, micro_batch: int, world: World) -> Iterator[Batch]:
        """This rank's micro-batches: `global_batch / (micro_batch * world.size)` of them for each step."""
        self._augment.check_micro_batch(micro_batch)
        draws = _Draws(self, steps, global_batch, micro_batch, world.rank, world.size)
        stream = BatchStream(
            draws,
            self.sources,
            Pixels(self._augment, self._seed, convert_icc=self.config.convert_icc),
            self.config,
            repeats=self.config.repeats,
        )
        return load(stream, self.config.num_workers, pin=world.device.type == "cuda")


def samples_per_epoch(config: DataConfig) -> int:
    """`TrainData.samples_per_epoch`, from the manifests alone."""
    return sum(len(pool_of(manifest, index, config.subset)) for _, manifest, index in united(config)) * config.repeats


class _Draws:
    """What one rank draws, micro-batch by micro-batch, from a step of the run on."""

    def __init__(
        self, data: TrainData, steps: range, global_batch: int, micro_batch: int, rank: int, size: int
    ) -> None:
        self._data, self._steps, self._global_batch = data, steps, global_batch
        self._share = {"rank": rank, "num_ranks": size, "micro_batch": micro_batch}

    def __iter__(self) -> Iterator[Drawn]:
        for step in self._steps:
            yield from zip(*self._data.draw_share(step, self._global_batch, **self._share), strict=True)


class EvalData:
    """A split in evaluation form: each sample once, unshuffled, nothing dropped."""

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig,
        *,
        split: str | None = None,
        subset: Subset | None = None,
        world: World | None = None,
        change: Change | None = None,
    ) -> None:
        """`change`: what is done to every image in its evaluation form."""
        self.manifest = Manifest.open(config.url)
        self._config, self._augment = config, augment
        self.split = split or config.eval_split or "val"
        self.index = self.manifest.split(self.split)
        self.pool = pool_of(self.manifest, self.index, subset or config.eval_subset if split is None else subset)
        self.label_table = _table(self.manifest.classes, self.manifest.labels)
        reader = _reader(config, self.index)
        refuse_faults(look_at_shards([reader], world), 0)
        self._sources = _sources([reader], [self.manifest], list(self.manifest.classes))
        self._pixels = Pixels(augment, None, convert_icc=config.convert_icc, change=change)

    @property
    def num_samples(self) -> int:
        return len(self.pool)

    def batches(self, batch_size: int, *, rank: int = 0, num_ranks: int = 1, pin: bool = False) -> Iterator[Batch]:
        """Batches of at most `batch_size`; rank r of R takes the samples r, r + R, ... of the split.

        Raises:
            UserError: a sample cannot be read. A number over a part of a split would be a wrong number.
        """
        mine = self.pool[rank::num_ranks]
        parts = [np.asarray(mine[i : i + batch_size], np.int64) for i in range(0, len(mine), batch_size)]
        draws = [(np.zeros_like(part), part, np.zeros_like(part)) for part in parts]
        stream = BatchStream(draws, self._sources, self._pixels, self._config, repeats=1)
        for batch in load(stream, self._config.num_workers, pin=pin):
            if batch.lost:
                loss = batch.lost[0]
                raise UserError(
                    f"sample {loss.key} of {objects.join(self._config.url, loss.shard)} cannot be evaluated: "
                    f"{loss.reason}; restore the shard, or prepare the dataset again"
                )
            yield batch


def _reader(config: DataConfig, index: SplitIndex, layout: LaneLayout | None = None) -> ShardReader:
    return ShardReader(index, index.url, config.block_bytes, make_cache(config, index, layout), layout=layout)


def _sources(readers: list[ShardReader], manifests: list[Manifest], classes: list[str]) -> Sources:
    number = {name: i for i, name in enumerate(classes)}
    maps = [np.array([number[name] for name in manifest.classes]) for manifest in manifests]
    counts = [reader.index.num_samples for reader in readers]
    return Sources(readers, maps, [sum(counts[:i]) for i in range(len(counts))])


def _table(sets: Sequence[str], labels: Sequence[str]) -> torch.Tensor | None:
    """(sets, labels) float32, see `label_sets.targets`; None with one label an image."""
    return torch.from_numpy(label_sets.targets(sets, labels)).float() if labels else None
