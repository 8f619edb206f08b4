"""A few hundred of the user's own images as a dataset of their own, and what is done to its copies."""

import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.format.manifest import NAME, Manifest, SplitIndex, dataset_digest
from pipeline.data.format.pieces import Shard
from pipeline.data.format.shards import ShardSample, shard_name, write_shard
from pipeline.data.images.formats import ending_of
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.prepare.assemble import assemble, make_piece
from pipeline.data.prepare.journal import Record
from pipeline.errors import UserError
from pipeline.storage import objects

IMAGES, EVAL_IMAGES = 512, 64
READ_THREADS = 16
EMBEDDED = "digits"


def copy_of(config: DataConfig, folder: Path, *, num_images: int) -> DataConfig:
    """The data of a run with each source replaced by a small copy of it in `folder`; without one, the embedded digits.

    Args:
        num_images: of the user's training data: decides whether one unreadable image is within the budget.
    """
    sources = config.sources() if config.url else [(_embedded(folder), 1.0)]
    splits = config.train_split.split("+")
    copies = []
    for number, (url, weight) in enumerate(sources):
        wanted = dict.fromkeys(splits, IMAGES)
        if number == 0 and config.eval_split:
            wanted.setdefault(config.eval_split, EVAL_IMAGES)
        copies.append((_copy(url, folder / f"data{number}", wanted), weight))
    return replace(
        config,
        url=copies[0][0],
        mixture=tuple(f"{url}={weight}" for url, weight in copies[1:]),
        subset=None,
        eval_subset=None,
        skip_steps=(),
        max_lost_share=0.0,
        max_lost_samples=min(1, config.lost_allowed(num_images)),
        num_workers=min(1, config.num_workers),
        mix_blocks=16,
        block_mb=0.01,
        cache_dir="",
    )


def _embedded(folder: Path) -> str:
    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.sources.cards import load_card

    return prepare(load_card(EMBEDDED), str(folder / EMBEDDED)).url


def _copy(url: str, folder: Path, wanted: dict[str, int]) -> str:
    """A dataset with the same classes, and of each split so many images, evenly from all of it."""
    theirs = Manifest.open(url)
    folder.mkdir()
    records = [_record(theirs, theirs.split(name), folder, num) for name, num in wanted.items()]
    note = f"{sum(len(r.keys) for r in records)} images of {url}, for a drill"
    made = [make_piece(folder, record.split, 0, [record], theirs.num_classes) for record in records]
    manifest = assemble(theirs.name, str(folder), theirs.classes, made, {}, note, folder, theirs.labels)
    (folder / NAME).write_bytes(manifest.to_json())
    return str(folder)


def _record(theirs: Manifest, index: SplitIndex, folder: Path, num: int) -> Record:
    rows = np.unique(np.linspace(0, index.num_samples - 1, min(num, index.num_samples)).astype(int))
    keys, about = tuple(str(key) for key in index.keys[rows]), index.rows(rows)

    def read(row: np.void) -> bytes:
        shard = objects.join(theirs.url, index.shards[row["shard"]].name)
        data = objects.read_range(shard, int(row["offset"]), int(row["size"]))
        if zlib.crc32(data) != row["crc32"]:
            raise UserError(f"an image of {shard} is not what the index says; 'normfree data verify {theirs.url}'")
        return data

    with ThreadPoolExecutor(READ_THREADS) as pool:
        images = list(pool.map(read, about))
    samples = [
        ShardSample(key, int(row["label"]), data, ending_of(data) or "png")
        for key, row, data in zip(keys, about, images, strict=True)
    ]
    written = write_shard(samples, folder / shard_name(index.name, 0))
    return Record(
        "",
        index.name,
        Shard(written.path.name, written.size_bytes, written.sha256, len(rows)),
        keys,
        np.array(written.offsets, np.int64),
        about["size"],
        about["label"],
        index.keys.hashes_of(rows),
        about["crc32"],
        (),
    )


def with_flipped_byte(config: DataConfig, folder: Path, *, source: int, shard: str, key: str) -> DataConfig:
    """A copy of the data in which one byte of one image is another."""
    urls = [url for url, _ in config.sources()]
    copied = Path(shutil.copytree(urls[source], folder))
    index = next(i for i in _splits(Manifest.open(str(copied))) if i.shards[0].name == shard)
    row = list(index.keys).index(key)
    with (copied / shard).open("r+b") as file:
        file.seek(int(index.offset[row]) + int(index.size[row]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0xFF]))
    urls[source] = str(copied)
    weights = [weight for _, weight in config.sources()]
    mixture = tuple(f"{url}={weight}" for url, weight in zip(urls[1:], weights[1:], strict=True))
    return replace(config, url=urls[0], mixture=mixture)


def with_another_class(config: DataConfig, folder: Path) -> DataConfig:
    """A copy of the data whose last class has another name."""
    copied = Path(shutil.copytree(config.url, folder))
    theirs = Manifest.open(str(copied))
    classes, labels = (
        theirs.classes,
        theirs.labels[::-1],
    )  # of labels the order is changed: names of sets follow from theirs
    if not labels:
        classes = (*classes[:-1], f"{classes[-1]}, renamed")
    digest = dataset_digest(classes, theirs.splits, labels)
    changed = replace(theirs, classes=classes, labels=labels, digest=digest)
    (copied / NAME).write_bytes(changed.to_json())
    return replace(config, url=str(copied))


def _splits(manifest: Manifest) -> list[SplitIndex]:
    return [manifest.split(name) for name in manifest.splits]
