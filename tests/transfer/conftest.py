"""A sweep over the embedded digits with real heads on stand-in backbones: pixels, and random shares of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.images.decode import decode_image
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.storage import objects
from transfer.probes import features
from transfer.protocol.method_settings import KnnSettings, RidgeSettings
from transfer.protocol.methods import Method
from transfer.protocol.tasks import Suite, Task, TaskEntry
from transfer.results import rerun
from transfer.sweep import probe_job
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.ledger import Ledger, SweepInfo
from transfer.sweep.sources import Backbone

WEIGHTS = "c" * 64


def _pixels(task: Task, split: str) -> tuple[np.ndarray, np.ndarray]:
    manifest = Manifest.open(task.url)
    index = manifest.split(split)
    whole = [objects.read_bytes(objects.join(task.url, shard.name)) for shard in index.shards]
    places = zip(index.shard.tolist(), index.offset.tolist(), index.size.tolist(), strict=True)
    images = [_small(decode_image(whole[shard][start : start + size])[:, :, 0]) for shard, start, size in places]
    return np.stack(images).astype(np.float32), index.label.astype(np.int64)


def _small(pixels: np.ndarray) -> np.ndarray:
    """Large images as means of 8 x 8 pixels, so that there are fewer of them than images."""
    side = len(pixels)
    return pixels.ravel() if side < 64 else pixels.reshape(side // 8, 8, side // 8, 8).mean((1, 3)).ravel()


def _extract(model: Any, task: Task, augment: AugmentConfig, split: str, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = _pixels(task, split)
    if model == "pixels":
        return images, labels
    return images @ np.random.default_rng(model).normal(size=(images.shape[1], 4)).astype(np.float32), labels


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """While this holds, `pretrained` gives pixels, and `from_scratch` four random mixtures of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "extract", _extract)
        patch.setattr(probe_job, "pretrained", lambda url, digest: features.Backbone("pixels", f"checkpoint {url}"))  # type: ignore[arg-type]
        patch.setattr(probe_job, "from_scratch", lambda name, options, seed: features.Backbone(seed, f"weights {seed}"))
        patch.setattr(rerun, "find_origin", lambda url: SimpleNamespace(digest=WEIGHTS))
        yield


@pytest.fixture()
def stand_ins() -> Iterator[None]:
    with standing_in():
        yield


def claimed_sweep(
    out: Path, data: str, source: Backbone, methods: tuple[Method, ...], *, card: str, holdout: int, num_seeds: int
) -> Sweep:
    """Of one task at the URL `data`; its folder is made, and nothing has run."""
    task = TaskEntry(card=card, holdout_per_class=holdout)
    suite = Suite(name="s", title="s", tasks=(task,), methods=methods, num_seeds=num_seeds)
    sweep = Sweep(out=str(out), data_root=str(Path(data).parent), sources=(source,), suite=suite)
    Ledger(str(out)).claim(
        SweepInfo(
            suite="s",
            suite_digest=suite.digest(),
            checkpoint_url=source.checkpoint_url,
            checkpoint_digest=source.digest,
            model=source.model,
            started_s=1.7e9,
            command="normfree transfer",
            hardware="",
            num_seeds=num_seeds,
            not_run=[],
            plan=sweep.plain(),
        )
    )
    return sweep


def run_sweep(
    out: Path,
    digits: str,
    *,
    l2: float = 1024.0,
    weights: str = WEIGHTS,
    num_seeds: int = 3,
    methods: tuple[Method, ...] = (),
    card: str = "digits",
) -> Path:
    """Ridge at 1 and 5 shots and nearest neighbours at 5, with everything that a sweep writes."""
    source = Backbone(
        checkpoint_url="/runs/pixels",
        digest=weights,
        model="nfnet_tiny",
        options={},
        augment=AugmentConfig(),
        name="pixels",
    )
    methods = methods or (
        Method(name="ridge", kind="ridge", settings=RidgeSettings(shots=(1, 5), l2=l2)),
        Method(name="knn", kind="knn", settings=KnnSettings(shots=(5,), ks=(1, 10, 40))),
    )
    sweep = claimed_sweep(out, digits, source, methods, card=card, holdout=10, num_seeds=num_seeds)
    cells = plan(sweep)[0]
    with standing_in():
        for init in ("pretrained", "scratch"):
            assert all(entry.is_ok for entry in probe_job.run_probes(sweep, [c for c in cells if c.init == init]))
    return out


@pytest.fixture(scope="session")
def glyph_sets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the embedded set with several labels an image, prepared."""
    url = str(tmp_path_factory.mktemp("several") / "glyph_sets")
    prepare(load_card("glyph_sets"), url)
    return url


@pytest.fixture(scope="session")
def digits_sweep(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Path:
    """The folder of that sweep; not to be changed."""
    return run_sweep(tmp_path_factory.mktemp("sweeps") / "pixels", digits)


@pytest.fixture(scope="session")
def more_sweeps(tmp_path_factory: pytest.TempPathFactory, digits: str) -> tuple[Path, Path]:
    """Another source by the same protocol, and the first one by another protocol."""
    folder = tmp_path_factory.mktemp("more")
    return run_sweep(folder / "other", digits, weights="d" * 64), run_sweep(folder / "l2", digits, l2=1.0)
