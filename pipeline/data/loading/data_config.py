"""What a run states about its data."""

import itertools
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline import places
from pipeline.configuration import check_fields
from pipeline.data.sampling.subset import Subset
from pipeline.errors import UserError
from pipeline.field_types import GIGABYTES, MEGABYTES, Count, CountOrZero, Positive, Range, Share, Text


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    url: str = ""
    """Folder or object-store prefix that holds manifest.json."""
    mixture: tuple[str, ...] = ()
    """More datasets to train on, each as URL=WEIGHT; `url` itself has the weight `url_weight`. Classes are united by name."""
    url_weight: Positive = 1.0
    """Of `url` among the datasets of `mixture`."""
    train_split: Text = "train"
    """Or several with + between, as train+val: each of their images once an epoch."""
    eval_split: Text | None = "val"
    """The split that the run is evaluated on; none: it is not evaluated."""
    subset: Subset | None = None
    """Train on a few images of each class only."""
    eval_subset: Subset | None = None
    """Evaluate on a few images of each class only."""
    block_mb: Annotated[float, Range(0), MEGABYTES] = 1.0
    """Neighbours in a shard that are read together, in MB; 0 = each sample by itself."""
    mix_blocks: CountOrZero = 256
    """Blocks, from anywhere in the dataset, that samples come from at any moment; 0 = all, which is the full shuffle. For
    windowed."""
    order: Literal["windowed", "lanes", "correlated"] = "windowed"
    """windowed: every rank reads from every block. lanes: each rank has lanes of blocks of its own, at any size of the
    dataset; a set that is too small for lanes is shuffled whole. correlated: windowed, then each global batch sorted by class,
    so that micro-batches and groups of samples hold few classes; for experiments."""
    lanes: CountOrZero = 0
    """Lanes of the order; a divisor of the different samples in a global batch, at least twice the number of hosts. 0 = as
    many as dataset and batch allow, at most 512."""
    lane_blocks: Count = 16
    """Blocks of a lane that samples come from at any moment. lanes x lane_blocks of the size of the batch mixes well."""
    convert_icc: bool = True
    """Colours are brought to sRGB by an image's embedded ICC profile; false: profiles are ignored, as torchvision, timm and
    TensorFlow do."""
    repeats: Count = 1
    """Repeated augmentation: each sample comes this many times in its global batch, augmented differently."""
    skip_steps: tuple[str, ...] = ()
    """Steps of the data that no update uses, as FIRST:END; may be added when a run is resumed."""
    max_lost_share: Share = 0.001
    """Samples that may be unreadable in an epoch, as a share; one more stops the run on all ranks."""
    max_lost_samples: CountOrZero = 0
    """The same as a number; the larger of the two counts."""
    num_workers: CountOrZero = 0
    """Loader processes of each rank; 0 = in the training process."""
    read_threads: Count = 8
    """Requests that each loader process has under way; out of an object store at first, and then as many as bring the most, up
    to four times so many."""
    read_ahead_mb: Annotated[float, Range(1), MEGABYTES] = 128.0
    """Encoded images that each loader process may hold before they are used."""
    cache_dir: str = ""
    """Where blocks from an object store are kept; empty = ~/.cache/normfree/shards."""
    cache_gb: Annotated[float, Range(0), GIGABYTES] = 50.0
    """Size of that cache; 0 = none."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
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
