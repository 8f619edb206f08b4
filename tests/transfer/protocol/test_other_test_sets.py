"""Other sets and corruptions beside a task: measured by a final trial's head, after the selection."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.augment.corruptions import SEVERITIES, corrupt
from pipeline.data.images.decode import decode_image
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from tests.transfer import recompute
from tests.transfer.conftest import WEIGHTS, _pixels, standing_in
from tests.transfer.protocol.test_imagenet_labels import picture
from transfer.metric_facts import facts_of
from transfer.probes import features
from transfer.protocol.method_settings import FinetuneSettings, RidgeSettings
from transfer.protocol.methods import Method
from transfer.protocol.sealed_splits import openings
from transfer.protocol.tasks import Suite, Task, TaskEntry
from transfer.results.scorecard import scorecard, with_extra_metrics
from transfer.sweep import probe_job, trials
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.sources import Backbone

METHOD = Method(name="ridge", kind="ridge", settings=RidgeSettings(split="full"))
NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, a set with two of them in another order of numbers, and one with a class of its own."""
    folder = tmp_path_factory.mktemp("others")
    for label, name in enumerate(NAMES):
        for copy in range(6):
            picture(10 * label + copy, folder / "raw" / ("train" if copy < 4 else "val") / name / f"{copy}.png")
    for label, name in ((3, "dog"), (1, "bee")):
        for copy in range(10):  # half of them are seen in training, the others look like any class
            picture(10 * label + (copy if copy < 4 else 500 + copy), folder / "raw_two" / "test" / name / f"{copy}.png")
    picture(1, folder / "raw_own" / "test" / "eel" / "1.png")
    picture(2, folder / "raw_own" / "test" / "dog" / "1.png")
    for name, tests in (("", {}), ("_two", {"test": 20}), ("_own", {"test": 2})):
        card = replace(load_card("images"), splits=tests, label_rule="the folder's name" if tests else None)
        prepare(card, str(folder / f"data{name}"), source=str(folder / f"raw{name}"))
    return folder


def make_sweep(root: Path, out: Path, method: Method = METHOD, **stated: tuple[str, ...]) -> Sweep:
    from pipeline.data.augment.augment_config import AugmentConfig

    source = Backbone(
        checkpoint_url="/runs/p", digest=WEIGHTS, model="nfnet_tiny", options={}, augment=AugmentConfig(image_px=16)
    )
    entry = TaskEntry(card="images", data="data", label="mine", holdout_per_class=1, **stated)  # type: ignore[arg-type]
    suite = Suite(name="s", title="s", tasks=(entry,), methods=(method,), num_seeds=1)
    return Sweep(out=str(out), data_root=str(root), sources=(source,), suite=suite)


def _changed(task: Task, split: str, corruption: tuple[str, int]) -> tuple[np.ndarray, np.ndarray]:
    from pipeline.data.format.manifest import Manifest
    from pipeline.storage import objects

    index = Manifest.open(task.url).split(split)
    whole = [objects.read_bytes(objects.join(task.url, shard.name)) for shard in index.shards]
    places = zip(index.shard.tolist(), index.offset.tolist(), index.size.tolist(), strict=True)
    images = [
        corrupt(*corruption, decode_image(whole[s][b : b + n]), i)[:, :, 0].ravel()
        for i, (s, b, n) in enumerate(places)
    ]
    return np.stack(images).astype(np.float32), index.label.astype(np.int64)


@pytest.fixture(scope="module")
def measured(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, LedgerEntry]:
    out = tmp_path_factory.mktemp("sweep")
    sweep = make_sweep(root, out, also=("data_two",), corruptions=("gaussian_noise", "contrast"))

    def extract(model: object, task: Task, augment: object, split: str, *, convert_icc: bool, **more: object) -> object:
        corruption = more.get("corruption")
        return _changed(task, split, corruption) if corruption else _pixels(task, split)  # type: ignore[arg-type]

    with standing_in(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "extract", extract)
        cells = [c for c in plan(sweep)[0] if c.init == "pretrained"]
        (found,) = probe_job.run_probes(sweep, cells)
    assert found.is_ok, found.error
    return sweep, found


def test_both_are_what_numpy_computes(measured: tuple[Sweep, LedgerEntry]) -> None:
    sweep, found = measured
    task = sweep.task("mine")
    x, y = _pixels(task, "train")
    other = Task(**{**vars(task), "url": f"{sweep.data_root}/data_two"})
    two, labels = _pixels(other, "test")
    scores = recompute.ridge(x.astype(float), y, two.astype(float), 4, 1024.0)
    among = scores[:, [1, 3]]  # bee and dog
    assert found.metrics["top1_on_data_two"] == recompute.top1(among, labels)
    assert recompute.top1(among, labels) != recompute.top1(scores, np.array([1, 3])[labels])  # the choice is among two
    shares = []
    for name in ("gaussian_noise", "contrast"):
        for severity in SEVERITIES:
            z, truth = _changed(task, "val", (name, severity))
            shares.append(recompute.top1(recompute.ridge(x.astype(float), y, z.astype(float), 4, 1024.0), truth))
    assert found.metrics["top1_corrupted"] == pytest.approx(np.mean(shares))


def test_another_set_opens_after_the_selection_and_both_stand_in_the_table(measured: tuple[Sweep, LedgerEntry]) -> None:
    sweep, found = measured
    task = sweep.task("mine")
    assert [(o.what, o.data_digest) for o in openings(sweep.out)] == [
        ("test", task.data_digest),
        ("data_two", task.extra_tests.others[0].digest),
    ]
    rows = with_extra_metrics(scorecard([found]))
    assert [(r.metric, r.facts.title) for r in rows] == [
        ("top1", "top-1 accuracy"),
        ("top1_on_data_two", "top-1 accuracy on data_two"),
        ("top1_corrupted", "mean top-1 over corruptions"),
    ]
    assert facts_of("top1_on_x").counts_images and not facts_of("top1_corrupted").counts_images


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"also": ("data_own",)}, r"data_own has classes that .*data lacks \(1, eel"),
        ({"also": ("gone",)}, "there is no dataset at"),
        ({"also": ("data_two", "./data_two")}, "two datasets would be top1_on_data_two"),
        ({"corruptions": ("frost",)}, "corruptions has 'frost', which needs what is not here; choose all"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_trial(
    root: Path, tmp_path: Path, stated: dict[str, tuple[str, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(make_sweep(root, tmp_path, **stated))


def test_a_fine_tuned_network_is_measured_too(root: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(split="full", learning_rates=(0.1,), num_steps=(2,), batch=8)
    method = Method(name="finetune", kind="finetune", settings=settings)
    sweep = make_sweep(root, tmp_path, method, also=("data_two",), corruptions=("contrast",))
    cell = next(c for c in plan(sweep)[0] if c.init == "scratch")
    cell.select(sweep.out, dict(cell.points[0]), [])
    found = trials.run_finetune(sweep, cell.finals(dict(cell.points[0]), 1)[0], lambda row: None)
    assert found is not None and {"top1_on_data_two", "top1_corrupted"} <= found.metrics.keys()
    assert not (tmp_path / "work" / found.digest).exists()
