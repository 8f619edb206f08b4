"""Bytes -> pixels -> batches, in the training process or in loader processes, which differ in nothing but speed.

A sample that cannot be had leaves no hole: the next readable one of its micro-batch takes its place, augmented as the lost
one would have been, and the batch says so. A micro-batch with no readable sample at all is marked, and the run stops.
"""

import copy
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nfnet.optim.losses import MixedLabels
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.batch_augment import finish_batch
from pipeline.data.augment.transforms import eval_image, sample_rng, train_image
from pipeline.data.images.decode import DecodeError, Picture, WholePicture, open_picture
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.loading.prefetch import Place, ReadAhead, Reading, places_of
from pipeline.data.loading.shard_reader import ShardReader, Unreadable

DECODED_CACHE_BYTES = 512 << 20
READ_BY_STEPS = ("images", "labels", "other_labels", "weights")
"""Tensors of a batch."""
Change = Callable[[np.ndarray, int], np.ndarray]
"""Of evaluation images: (H, W, 3) uint8 and the number of the sample -> the same shape."""


@dataclass(frozen=True)
class UnreadableSample:
    """A sample that a step should have used and could not."""

    source: int
    epoch: int
    shard: str
    key: str
    reason: str
    filled_with: str
    """Key of the sample in its place; empty where there was none."""


@dataclass(frozen=True)
class Batch:
    """`images`: (N, H, W, 3) uint8; `labels`: (N,) int64; `samples`: (N,) int64 numbers of the samples (sources one after
    another, each in its index's order)."""

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    lost: tuple[UnreadableSample, ...] = ()
    other_labels: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    """Of mixed images: the second label of each, (N,) int64, and the first one's share, (N,) float32."""
    notice: str = ""
    """What the loader process has to say, each time; empty if nothing."""
    num_bytes: int = 0
    """Of the encoded images."""
    read_s: float = 0.0
    decode_s: float = 0.0
    """Seconds in which the loader process waited for bytes, and made pixels of them."""

    @property
    def is_placeholder(self) -> bool:
        """No sample of it was readable; its images are black."""
        return len(self.lost) == len(self.labels) > 0 and not self.lost[0].filled_with

    def pin_memory(self) -> "Batch":
        return self._each((*READ_BY_STEPS, "samples"), torch.Tensor.pin_memory)

    def on(self, device: torch.device) -> "Batch":
        """With all that a step reads there, queued on the current stream; `samples` stays with the host, which counts them."""
        return self._each(READ_BY_STEPS, lambda t: t.to(device, non_blocking=True))

    def _each(self, names: Sequence[str], change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {name: getattr(self, name) for name in names}
        changed: dict[str, Any] = {name: change(t) for name, t in tensors.items() if t is not None}
        return replace(self, **changed)

    def targets(self, device: torch.device, table: torch.Tensor | None = None) -> torch.Tensor | MixedLabels:
        """What the loss takes, on the device.

        Args:
            table: where images have several labels, (sets, labels) as `label_sets.targets`, on the device; then (N, labels)
                float32.
        """
        labels = self.labels.to(device, non_blocking=True)
        if self.other_labels is None or self.weights is None:
            return labels if table is None else table[labels]
        other, weights = (t.to(device, non_blocking=True) for t in (self.other_labels, self.weights))
        if table is None:
            return MixedLabels(labels, other, weights)
        first, second = (table[of] for of in (labels, other))
        mixed = torch.lerp(second, first, weights[:, None])
        return torch.where((first < 0) | (second < 0), torch.full_like(mixed, -1.0), mixed)


class Pixels:
    """The one place where bytes become pixels: uint8 (H, W, 3), the network's input before `normalise`.

    `seed` None: evaluation form, the same each time. Small sets of what is decoded whole are decoded once; large ones fill
    the room and stop there.
    """

    def __init__(
        self, augment: AugmentConfig, seed: int | None, *, convert_icc: bool = True, change: Change | None = None
    ) -> None:
        self.augment, self._seed, self._convert_icc, self._change = augment, seed, convert_icc, change
        self._decoded: dict[int, WholePicture] = {}
        self._room_bytes = DECODED_CACHE_BYTES

    @property
    def px(self) -> int:
        return self.augment.evaluation_px if self._seed is None else self.augment.image_px

    def __call__(self, data: bytes, out: torch.Tensor, *, number: int, view: int, drawn_for: int) -> None:
        """Fill `out` (px, px, 3). `number`: of the sample; (view, drawn_for) seed its crop. DecodeError if it is no image."""
        picture = self._picture(data, number)
        if self._seed is None:
            pixels = eval_image(picture, self.augment)
            out.copy_(torch.from_numpy(pixels if self._change is None else self._change(pixels, number)))
        else:
            train_image(picture, self.augment, sample_rng(self._seed, view, drawn_for), out)

    def _picture(self, data: bytes, number: int) -> Picture:
        if number in self._decoded:
            return self._decoded[number]
        picture = open_picture(data, convert_icc=self._convert_icc)
        if isinstance(picture, WholePicture) and picture.pixels.nbytes <= self._room_bytes:
            self._decoded[number] = picture
            self._room_bytes -= picture.pixels.nbytes
        return picture

    def finish(self, images: torch.Tensor, keys: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mixing and policies of a micro-batch in place, see `finish_batch`; `keys`: (view, drawn_for) of each image."""
        mixed = None if self._seed is None else finish_batch(images.numpy(), keys, self.augment, seed=self._seed)
        return None if mixed is None else (torch.from_numpy(mixed[0]), torch.from_numpy(mixed[1]))


@dataclass
class Sources:
    """The datasets of a run side by side: readers, labels in the run's numbering, and where each one's samples begin."""

    readers: Sequence[ShardReader]
    label_maps: Sequence[np.ndarray]
    """By source: class number of the source -> class number of the run."""
    firsts: Sequence[int]
    """By source: number of its first sample in the run's numbering."""

    def number(self, place: Place) -> int:
        return self.firsts[place.source] + place.sample

    def key(self, place: Place) -> str:
        return str(self.readers[place.source].index.keys[place.sample])

    def shard(self, place: Place) -> str:
        index = self.readers[place.source].index
        return str(index.shards[int(index.rows([place.sample])["shard"][0])].name)


def _fresh(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8, of any content; of a loader process in shared memory, where it must go anyway: that saves a copy of the batch."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # as torch's own collation makes one


class BatchStream(IterableDataset[Batch]):
    """Micro-batches in order. Of W loader processes the w-th makes the numbers w, w + W, ...; the loader interleaves them."""

    def __init__(
        self,
        draws: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
        sources: Sources,
        pixels: Pixels,
        config: DataConfig,
        *,
        repeats: int,
    ) -> None:
        """`repeats`: views of a sample in an epoch, which those of an evaluation are not."""
        self._draws, self._sources, self._pixels, self._repeats = draws, sources, pixels, repeats
        self._config, self._first = config, 0

    def starting_at(self, number: int) -> "BatchStream":
        """The same stream without its first `number` micro-batches."""
        rest = copy.copy(self)
        rest._first = number
        return rest

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        mine = itertools.islice(iter(self._draws), self._first + first, None, stride)
        places, config = (places_of(*draw) for draw in mine), self._config
        budget_bytes = int(config.read_ahead_mb * 1e6)
        for reading in ReadAhead(
            self._sources.readers, places, budget_bytes=budget_bytes, num_threads=config.read_threads
        ):
            yield self._batch(reading)

    def _batch(self, reading: Reading) -> Batch:
        begin = time.perf_counter()
        px = self._pixels.px
        images = _fresh((len(reading.places), px, px, 3))
        reasons: dict[int, str] = {}
        for i, (place, content) in enumerate(zip(reading.places, reading.contents, strict=True)):
            reason = self._draw(content, place, place, images[i])
            if reason:
                reasons[i] = reason
        used = list(range(len(images)))
        lost = tuple(self._fill(i, reason, reading, images, used, set(reasons)) for i, reason in reasons.items())
        keys = [(place.view, self._sources.number(place)) for place in reading.places]
        mixed = self._pixels.finish(images, keys)
        places = [reading.places[i] for i in used]
        classes, maps = reading.rows["label"][used].tolist(), self._sources.label_maps
        labels = torch.tensor([int(maps[p.source][number]) for p, number in zip(places, classes, strict=True)])
        return Batch(
            images,
            labels,
            torch.tensor([self._sources.number(p) for p in places]),
            lost,
            None if mixed is None else labels[mixed[0]],
            None if mixed is None else mixed[1],
            next((r.cache.failure for r in self._sources.readers if r.cache and r.cache.failure), reading.notice),
            sum(len(c) for c in reading.contents if isinstance(c, bytes)),
            reading.wait_s,
            time.perf_counter() - begin,
        )

    def _draw(self, content: bytes | Unreadable, place: Place, drawn_for: Place, out: torch.Tensor) -> str:
        """Fill `out` with a sample's pixels; why that could not be, "" if it could."""
        if isinstance(content, Unreadable):
            return content.reason
        try:
            number, seed = self._sources.number(place), self._sources.number(drawn_for)
            self._pixels(content, out, number=number, view=drawn_for.view, drawn_for=seed)
        except DecodeError as error:
            reason = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # a place in memory says nothing, and differs each time
            return f"it does not decode ({reason})"
        return ""

    def _fill(
        self, i: int, reason: str, reading: Reading, images: torch.Tensor, used: list[int], lost: set[int]
    ) -> UnreadableSample:
        """Puts the next readable sample of the micro-batch, counted cyclically, in the place of sample i."""
        place, num, filled_with = reading.places[i], len(images), ""
        images[i].zero_()
        for j in ((i + k) % num for k in range(1, num)):
            if j not in lost and not self._draw(reading.contents[j], reading.places[j], place, images[i]):
                used[i], filled_with = j, self._sources.key(reading.places[j])
                break
        sources = self._sources
        epoch = place.view // self._repeats
        return UnreadableSample(place.source, epoch, sources.shard(place), sources.key(place), reason, filled_with)
