"""Training batches per second on one core, at 224 px: ours against timm's loader, webdataset + torchvision v2, and bare decoding.

The same JPEGs for all, from WebDataset shards on disk: Caltech-101 and clothing photos where NORMFREE_TEST_DATA (or
../shared/data) has them, else crops of two sample photos that scikit-learn carries, as the output says. All run in this process
on one core in alternation, without loader processes, up to a batch of uint8 on the host; a second is one of the core's, so that
other work on the machine counts against nobody. "Full" is crop, flip, MixUp on one
half and CutMix on the other, and four RandAugment operations of magnitude 10, always applied. The peers do the same work: crops
bicubic, geometry by nearest pixel, each operation with probability 1; timm also runs as its own recipes have it (probability
one half, geometry bicubic).
"""

import importlib.util
import io
import itertools
import logging
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.turns import hardware
from pipeline.data.augment.augment_config import AugmentConfig, nfnet_augment
from pipeline.data.images import turbojpeg
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.distributed import World

PX, BATCH, CLASSES = 224, 32, 101
SETS = {"caltech101": 2512, "clothing": 600}
"""Images of each set: its weight in the rate over both."""
TURN_BATCHES = 3

Work = Callable[[Path], Iterator[int]]
"""Folder of the shards -> the number of images of each batch that is made, without end."""


def _real_data() -> Path | None:
    folder = Path(os.environ.get("NORMFREE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    return folder if all((folder / f"{name}.tar").is_file() for name in SETS) else None


def _sample_photos(folder: Path, name: str) -> Path:
    """A tar of 600 crops of scikit-learn's two photos, in the sizes of the real set."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(p) for p in load_sample_images().images]
    width, height = (300, 260) if name == "caltech101" else (533, 400)
    rng = np.random.default_rng(0)
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(600):
            x, y = rng.integers(0, 640 - width + 1), rng.integers(0, 427 - height + 1)
            stream = io.BytesIO()
            photos[i % 2].crop((x, y, x + width, y + height)).save(stream, "JPEG", quality=90)
            info = tarfile.TarInfo(f"train/{i % 2}/{i:04d}.jpg")
            info.size = stream.tell()
            tar.addfile(info, io.BytesIO(stream.getvalue()))
    return path


def _shards(folder: Path) -> dict[str, Path]:
    """Each set's prepared shards."""
    real = _real_data()
    print(f"images: {'caltech101.tar and clothing.tar' if real else 'EMBEDDED sample photos, no real set was found'}")
    found = {}
    for name in SETS:
        source = real / f"{name}.tar" if real else _sample_photos(folder, name)
        out = folder / "shards" / name
        card = load_card(name if real else "images")
        prepare(card, str(out), source=str(source), splits=["train"], shard_bytes=4 << 20)
        found[name] = out
    return found


def _ours(augment: AugmentConfig) -> Work:
    def work(folder: Path) -> Iterator[int]:
        data = TrainData(DataConfig(url=str(folder)), augment, seed=0)
        world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        steps = range(1 << 20)
        for batch in data.batches(steps=steps, global_batch=BATCH, micro_batch=BATCH, world=world):
            yield len(batch.images)

    return work


def _urls(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.glob("train-*.tar"))


def _timm(probability: float, *, nearest: bool) -> Work:
    from timm.data import FastCollateMixup, create_dataset, create_loader

    logging.getLogger("timm").setLevel(logging.ERROR)

    def work(folder: Path) -> Iterator[int]:
        urls = _urls(folder)
        split = f"train-{{000000..{len(urls) - 1:06d}}}.tar|{SETS[folder.name]}"
        dataset = create_dataset("wds/", str(folder), split=split, is_training=True, batch_size=BATCH)
        mixup = FastCollateMixup(
            mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.5, mode="elem", label_smoothing=0.1, num_classes=CLASSES
        )
        loader = create_loader(
            dataset,
            (3, PX, PX),
            BATCH,
            is_training=True,
            auto_augment=f"rand-m10-n4-p{probability}",
            interpolation="bicubic",
            num_workers=0,
            persistent_workers=False,
            collate_fn=mixup,
            device=torch.device("cpu"),
        )
        if nearest:
            _use_nearest(dataset.transform)
        while True:
            for images, _ in loader.loader:  # what its prefetcher adds, normalising, is the device's work
                yield len(images)

    return work


def _use_nearest(transform: Any) -> None:
    from timm.data.auto_augment import RandAugment

    [policy] = [t for t in transform.transforms if isinstance(t, RandAugment)]
    for op in policy.ops:
        if "resample" in op.kwargs:
            op.kwargs["resample"] = 0


def _torchvision(*, tensors: bool) -> Work:
    import webdataset as wds
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(PX, interpolation=InterpolationMode.BICUBIC, antialias=True)
    policy = v2.RandAugment(num_ops=4, magnitude=10, fill=128)
    to_tensor: list[Any] = [] if tensors else [v2.PILToTensor()]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), policy, *to_tensor])
    mixing = v2.RandomChoice([v2.MixUp(alpha=0.2, num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)])

    def decode(data: bytes) -> Any:
        from PIL import Image

        if tensors:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        return Image.open(io.BytesIO(data)).convert("RGB")

    def work(folder: Path) -> Iterator[int]:
        stream = wds.WebDataset(_urls(folder), shardshuffle=False).shuffle(1000).to_tuple("jpg;jpeg", "cls")
        stream = stream.map(lambda s: (transform(decode(s[0])), int(s[1]))).batched(BATCH, partial=False)
        while True:
            for images, labels in stream:
                pixels = torch.as_tensor(np.stack(images)).float()  # its MixUp takes no uint8
                yield len(mixing(pixels, torch.as_tensor(labels))[0])

    return work


def _bare(decode: Callable[[bytes], object]) -> Work:
    """All pixels of each image, nothing else; the bytes are in memory already."""
    import webdataset as wds

    def work(folder: Path) -> Iterator[int]:
        kept = [sample[0] for sample in wds.WebDataset(_urls(folder), shardshuffle=False).to_tuple("jpg;jpeg")]
        for first in itertools.count(0, BATCH):
            for i in range(first, first + BATCH):
                decode(kept[i % len(kept)])
            yield BATCH

    return work


def _whole(data: bytes) -> object:
    header = turbojpeg.read_header(data)
    assert header is not None
    return turbojpeg.decode_box(data, header, (0, 0, header.width, header.height))


def _contenders() -> Iterator[tuple[str, Work]]:
    yield "ours, full", _ours(nfnet_augment(10, image_px=PX))
    yield "ours, crop + flip", _ours(AugmentConfig(image_px=PX))
    yield "timm, same work", _timm(1.0, nearest=True)
    yield "timm, its defaults", _timm(0.5, nearest=False)
    yield "webdataset + torchvision v2, tensors", _torchvision(tensors=True)
    yield "webdataset + torchvision v2, PIL", _torchvision(tensors=False)
    if importlib.util.find_spec("simplejpeg"):  # the quickest bare decoding on the registry: libjpeg-turbo 3.1
        import simplejpeg

        yield "bare decoding, simplejpeg", _bare(lambda data: simplejpeg.decode_jpeg(data))
    if turbojpeg.library():
        yield "bare decoding, the library we use", _bare(_whole)


def _turns(folders: dict[str, Path], turns: int) -> list[dict[str, dict[str, float]]]:
    """Each turn: contender -> set -> seconds of the core an image."""
    running = {(c, s): work(folder) for c, work in _contenders() for s, folder in folders.items()}
    found = []
    for turn in range(-1, turns):  # the first warms up
        seconds: dict[str, dict[str, float]] = {}
        for (name, set_name), batches in running.items():
            begin = time.process_time()
            done = sum(itertools.islice(batches, TURN_BATCHES))
            seconds.setdefault(name, {})[set_name] = (time.process_time() - begin) / done
        if turn >= 0:
            found.append(seconds)
    return found


def _both(seconds: dict[str, float]) -> float:
    """Seconds an image over both sets."""
    return sum(SETS[s] * seconds[s] for s in SETS) / sum(SETS.values())


def _print(turns: list[dict[str, dict[str, float]]]) -> None:
    median = statistics.median
    print(f"images/s on one core, {PX} px{'':>15} " + " ".join(f"{s:>11}" for s in SETS) + "        both")
    for name in turns[0]:
        rates = [1 / median(t[name][s] for t in turns) for s in SETS] + [1 / median(_both(t[name]) for t in turns)]
        print(f"  {name:<38} " + " ".join(f"{rate:11.0f}" for rate in rates))
    for what, ours, peer, target in (
        ("full, against timm", "ours, full", "timm", 2.0),
        ("full, against webdataset + torchvision v2", "ours, full", "webdataset", 1.5),
        ("crop + flip, against bare decoding", "ours, crop + flip", "bare", 0.7),
    ):
        ratios = sorted(min(_both(t[p]) for p in t if p.startswith(peer)) / _both(t[ours]) for t in turns)
        ratio = median(ratios)
        verdict = "met" if ratio >= target else "MISSED"
        print(f"  {what}: {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}), target {target}: {verdict}")


def main(turns: int = 15) -> None:
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folders = _shards(Path(temporary))
            print(
                f"partial decoding by {turbojpeg.library() or 'nothing: no TurboJPEG 3 library here'}  [{hardware()}]"
            )
            _print(_turns(folders, turns))
    finally:
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    main()
