"""What a run states about its data."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from pipeline import places
from pipeline.data.sampling.subset import Subset
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    url: str = ""
    """Folder or object-store prefix that holds manifest.json."""
    mixture: tuple[str, ...] = ()
    """More datasets to train on, each as URL=WEIGHT; `url` itself has the weight `url_weight`. Classes are united by name."""
    url_weight: float = 1.0
    train_split: str = "train"
    """Or several with + between, as train+val: each of their images once an epoch."""
    eval_split: str | None = "val"
    subset: Subset | None = None
    """Train on a few images of each class only."""
    eval_subset: Subset | None = None
    block_mb: float = 1.0
    """Neighbours in a shard that are read together, in MB; 0 = each sample by itself."""
    mix_blocks: int = 256
    """Blocks, from anywhere in the dataset, that samples come from at any moment; 0 = all, which is the full shuffle."""
    repeats: int = 1
    """Repeated augmentation: each sample comes this many times in its global batch, augmented differently."""
    skip_steps: tuple[str, ...] = ()
    """Steps of the data that no update uses, as FIRST:END; may be added when a run is resumed."""
    max_lost_share: float = 0.001
    """Samples that may be unreadable in an epoch, as a share; one more stops the run on all ranks."""
    max_lost_samples: int = 0
    """The same as a number; the larger of the two counts."""
    num_workers: int = 0
    """Loader processes of each rank; 0 = in the training process."""
    read_threads: int = 8
    """Requests that each loader process has under way."""
    read_ahead_mb: float = 128.0
    """Encoded images that each loader process may hold before they are used."""
    cache_dir: str = ""
    """Where blocks from an object store are kept; empty = ~/.cache/normfree/shards."""
    cache_gb: float = 50.0
    """Size of that cache; 0 = none."""

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("read_threads", 1), ("read_ahead_mb", 1)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}; set it to {least} or more")
        for name in ("mix_blocks", "block_mb", "num_workers", "cache_gb", "max_lost_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} is {getattr(self, name)}; set it to 0 or more")
        if not 0 <= self.max_lost_share <= 1:
            raise UserError(f"data.max_lost_share is {self.max_lost_share}; set it to a share from 0 to 1")
        if not self.url_weight > 0:
            raise UserError(f"data.url_weight is {self.url_weight}; set it above 0")
        self.sources(), self.skipped_ranges()

    @property
    def block_bytes(self) -> int:
        return int(self.block_mb * 1e6)

    def shard_cache(self) -> str:
        return self.cache_dir or str(places.cache_folder() / "shards")

    def sources(self) -> list[tuple[str, float]]:
        """(URL, weight) of each training dataset."""
        found = [(self.url, self.url_weight)]
        for text in self.mixture:
            url, equals, weight = text.rpartition("=")
            try:
                value = float(weight) if equals and url else -1.0
            except ValueError:
                value = -1.0
            if not value > 0:
                raise UserError(f"data.mixture has {text!r}; write a URL, =, and a weight above 0, as data/b=0.3")
            found.append((url, value))
        return found

    def skipped_ranges(self) -> list[tuple[int, int]]:
        """(first, end) of each range of `skip_steps`, sorted; UserError where they overlap."""
        found = []
        for text in self.skip_steps:
            match = re.fullmatch(r"(\d+):(\d+)", text)
            if match is None or int(match[1]) >= int(match[2]):
                raise UserError(f"data.skip_steps has {text!r}; write FIRST:END with FIRST below END, as 1000:1100")
            found.append((int(match[1]), int(match[2])))
        found.sort()
        for (_, end), (first, _) in itertools.pairwise(found):
            if first < end:
                raise UserError(f"data.skip_steps has ranges that overlap at {first}; join them to one")
        return found

    def data_step(self, step: int) -> int:
        """The step of the data that step `step` of the run uses: they differ by what was skipped before."""
        for first, end in self.skipped_ranges():
            step += end - first if step >= first else 0
        return step

    def lost_allowed(self, num_samples: int) -> int:
        """Samples of an epoch that may be unreadable."""
        return max(int(self.max_lost_share * num_samples), self.max_lost_samples)
