"""Batches of a dataset: training batches in the order of `pipeline.data.order`, evaluation batches each sample once.

    manifest -> pool of samples -> Order -> (epoch, sample) tokens -> read, decode, augment -> uint8 batch

The sampler hands out tokens and the workers are stateless functions of a token, so the number of workers changes nothing but
speed, and the whole state of the data is one integer (`start_samples`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from nfnet.losses import MixedLabels
from pipeline import storage
from pipeline.data.augment import AugmentConfig, eval_image, sample_rng, train_image
from pipeline.data.decode import DecodeError, Picture, WholePicture, open_picture
from pipeline.data.finish import finish_batch
from pipeline.data.manifest import Manifest, SplitIndex
from pipeline.data.order import Order, rank_share
from pipeline.data.subset import Subset, select
from pipeline.errors import UserError
from pipeline.world import World

DECODED_CACHE_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    url: str = ""
    """Folder or object-store prefix that holds manifest.json."""
    train_split: str = "train"
    eval_split: str | None = "val"
    subset: Subset | None = None
    """Train on a few images of each class only."""
    eval_subset: Subset | None = None
    window_shards: int = 16
    """Shards whose samples are mixed with each other, and which a rank may have open at once."""
    num_workers: int = 0
    """Loader processes of each rank; 0 = in the training process."""
    cache_dir: str = ""
    """Where shards from an object store are kept; empty = ~/.cache/normfree/shards."""

    def shard_cache(self) -> str:
        return self.cache_dir or os.path.join(os.path.expanduser("~"), ".cache", "normfree", "shards")


@dataclass(frozen=True)
class Batch:
    """`images`: (N, H, W, 3) uint8; `labels`: (N,) int64; `samples`: (N,) int64 numbers in the split's index.

    Mixed images have a second label each: `other_labels` (N,) int64, and `weights` (N,) float32, the first label's share.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    other_labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        fields = (self.images, self.labels, self.samples, self.other_labels, self.weights)
        return Batch(*(None if f is None else f.pin_memory() for f in fields))  # type: ignore[arg-type]

    def targets(self, device: torch.device) -> torch.Tensor | MixedLabels:
        """What the loss takes, on the device."""
        labels = self.labels.to(device, non_blocking=True)
        if self.other_labels is None or self.weights is None:
            return labels
        other, weights = (t.to(device, non_blocking=True) for t in (self.other_labels, self.weights))
        return MixedLabels(labels, other, weights)


class SampleReader:
    """Image bytes by sample number. Local shards are read in place, remote ones fetched whole into a verified cache."""

    def __init__(self, index: SplitIndex, url: str, cache_dir: str) -> None:
        self._index, self._url, self._cache_dir = index, url, cache_dir
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    def check_sizes(self) -> None:
        """Each shard is there with the size that the manifest states: a cut or missing one stops the run before step 0."""
        for shard in self._index.shards:
            url = storage.join(self._url, shard.name)
            size = storage.size_bytes(url) if storage.exists(url) else None
            if size != shard.size_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"shard {url} {found}, its manifest says {shard.size_bytes} bytes; restore it or prepare the dataset again"
                )

    def read(self, sample: int) -> bytes:
        shard = int(self._index.shard[sample])
        size = int(self._index.size[sample])
        data = os.pread(self._file(shard), size, int(self._index.offset[sample]))
        if len(data) != size:
            raise OSError(f"shard {self._index.shards[shard].name} ended inside sample {self.key(sample)}")
        return data

    def key(self, sample: int) -> str:
        return str(self._index.keys[sample])

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():  # a worker started by fork must not share file positions or clients
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            info = self._index.shards[shard]
            path = storage.fetch(
                storage.join(self._url, info.name),
                sha256=info.sha256,
                size_bytes=info.size_bytes,
                cache_dir=self._cache_dir,
            )
            if len(self._files) >= 256:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(path, os.O_RDONLY)
        return self._files[shard]


class _Samples(Dataset[Batch]):
    """A micro-batch's tokens (view, sample) -> its batch. Evaluation form without a seed."""

    def __init__(self, reader: SampleReader, index: SplitIndex, augment: AugmentConfig, seed: int | None) -> None:
        self._reader, self._labels, self._augment, self._seed = reader, index.label, augment, seed
        self._decoded: dict[int, WholePicture] = {}
        self._room_bytes = DECODED_CACHE_BYTES

    def _picture(self, sample: int) -> Picture:
        """Small sets of what is decoded whole are decoded once; large ones fill the room and stop there."""
        if sample in self._decoded:
            return self._decoded[sample]
        picture = open_picture(self._reader.read(sample))
        if isinstance(picture, WholePicture) and picture.pixels.nbytes <= self._room_bytes:
            self._decoded[sample] = picture
            self._room_bytes -= picture.pixels.nbytes
        return picture

    def _draw(self, view: int, sample: int, out: torch.Tensor) -> None:
        try:
            picture = self._picture(sample)
            if self._seed is None:
                out.copy_(torch.from_numpy(eval_image(picture, self._augment)))
            else:
                train_image(picture, self._augment, sample_rng(self._seed, view, sample), out)
        except DecodeError as error:
            raise UserError(
                f"sample {self._reader.key(sample)} of the dataset does not decode any more ({error}); "
                f"run 'normfree data prepare' again"
            ) from error

    def __getitems__(self, tokens: list[tuple[int, int]]) -> Batch:
        px = self._augment.evaluation_px if self._seed is None else self._augment.image_px
        images = torch.empty((len(tokens), px, px, 3), dtype=torch.uint8)
        if get_worker_info() is not None:
            images.share_memory_()  # where it must go anyway: saves a copy of the batch
        for token, out in zip(tokens, images, strict=True):
            self._draw(*token, out)
        mixed = None if self._seed is None else finish_batch(images.numpy(), tokens, self._augment, seed=self._seed)
        samples = torch.tensor([sample for _, sample in tokens])
        labels = torch.from_numpy(self._labels[samples.numpy()].astype(np.int64))
        if mixed is None:
            return Batch(images, labels, samples)
        partners, weights = (torch.from_numpy(m) for m in mixed)
        return Batch(images, labels, samples, labels[partners], weights)


class _Tokens:
    """Batch sampler: the micro-batches of one rank, from a position of the run to its end."""

    def __init__(
        self, order: Order, pool: np.ndarray, steps: range, global_batch: int, share: partial[np.ndarray]
    ) -> None:
        self._order, self._pool, self._steps, self._global_batch, self._share = order, pool, steps, global_batch, share

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            epochs, samples = self._order.positions(step * self._global_batch, self._global_batch)
            samples = self._pool[samples]
            for micro_epochs, micro_samples in zip(self._share(epochs), self._share(samples), strict=True):
                yield list(zip(micro_epochs.tolist(), micro_samples.tolist(), strict=True))


class TrainData:
    """The training split of a run: its size, and its micro-batches from any step on."""

    def __init__(self, config: DataConfig, augment: AugmentConfig, *, seed: int) -> None:
        self.manifest = Manifest.open(config.url)
        self._config, self._augment, self._seed = config, augment, seed
        self.index = self.manifest.split(config.train_split)
        self.pool = _pool(self.index, config.subset)
        self.reader = SampleReader(self.index, config.url, config.shard_cache())
        self.reader.check_sizes()
        counts = np.bincount(self.index.shard[self.pool], minlength=len(self.index.shards))
        self.order = Order(tuple(int(c) for c in counts if c), seed, config.window_shards)

    @property
    def num_samples(self) -> int:
        return self.order.num_samples

    def batches(self, *, steps: range, global_batch: int, micro_batch: int, world: World) -> Iterator[Batch]:
        """This rank's micro-batches: `global_batch / (micro_batch * world.size)` of them for each step."""
        self._augment.check_micro_batch(micro_batch)
        share = partial(rank_share, rank=world.rank, num_ranks=world.size, micro_batch=micro_batch)
        tokens = _Tokens(self.order, self.pool, steps, global_batch, share)
        samples = _Samples(self.reader, self.index, self._augment, self._seed)
        return iter(_loader(samples, tokens, self._config.num_workers, pin=world.device.type == "cuda"))


class EvalData:
    """A split in evaluation form: each sample once, unshuffled, nothing dropped."""

    def __init__(
        self, config: DataConfig, augment: AugmentConfig, *, split: str | None = None, subset: Subset | None = None
    ) -> None:
        self.manifest = Manifest.open(config.url)
        self._config, self._augment = config, augment
        self.split = split or config.eval_split or "val"
        self.index = self.manifest.split(self.split)
        self.pool = _pool(self.index, subset or config.eval_subset if split is None else subset)
        self.reader = SampleReader(self.index, config.url, config.shard_cache())
        self._samples = _Samples(self.reader, self.index, augment, None)

    @property
    def num_samples(self) -> int:
        return len(self.pool)

    def batches(self, batch_size: int, *, rank: int = 0, num_ranks: int = 1, pin: bool = False) -> Iterator[Batch]:
        """Batches of at most `batch_size`; rank r of R takes the samples r, r + R, ... of the split."""
        mine = self.pool[rank::num_ranks].tolist()
        tokens = [[(0, s) for s in mine[i : i + batch_size]] for i in range(0, len(mine), batch_size)]
        return iter(_loader(self._samples, tokens, self._config.num_workers, pin=pin))


def _pool(index: SplitIndex, subset: Subset | None) -> np.ndarray:
    return np.arange(index.num_samples) if subset is None else select(index.label, subset)


def _whole(batch: Batch) -> Batch:
    return batch


def _loader(samples: Dataset[Batch], tokens: object, num_workers: int, *, pin: bool) -> DataLoader[Batch]:
    return DataLoader(
        samples,
        batch_sampler=tokens,  # type: ignore[arg-type]
        collate_fn=_whole,  # type: ignore[arg-type]
        num_workers=num_workers,
        # An object store's client must not be inherited through fork (s3fs refuses, others hang).
        multiprocessing_context="forkserver" if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin,
    )
