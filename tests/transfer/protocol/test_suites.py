"""The suites that come with the house: their cards, the published sizes, and what becomes of tasks that nobody prepared."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.sources.cards import load_card
from transfer import metrics
from transfer.protocol.method_settings import VTAB_IMAGES
from transfer.protocol.suite_files import list_suites, load_suite
from transfer.protocol.tasks import Suite, TaskEntry, open_task
from transfer.protocol.vtab import TASKS
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.finetune import Backbone, finetune_augment

SOURCE = Backbone(
    checkpoint_url="nowhere",
    digest="c" * 64,
    model="nfnet_tiny",
    options={},
    augment=AugmentConfig(image_px=64, eval_resize="aspect"),
)

# Images to fit, images of the test, metric: Kornblith et al. 2019, table 1; ILSVRC-2012; task_adaptation for the last two.
PUBLISHED = {
    "imagenet": (1_281_167, 50_000, "top1"),
    "cifar10_full": (50_000, 10_000, "top1"),
    "cifar100_full": (50_000, 10_000, "top1"),
    "pets": (3680, 3669, "mean_per_class"),
    "flowers102": (2040, 6149, "mean_per_class"),
    "food101": (75_750, 25_250, "top1"),
    "cars": (8144, 8041, "top1"),
    "aircraft": (6667, 3333, "mean_per_class"),
    "dtd": (3760, 1880, "top1"),
    "sun397": (19_850, 19_850, "top1"),
    "caltech101_full": (3060, 6084, "mean_per_class"),
    "birdsnap": (47_386, 2443, "top1"),
    "eurosat": (21_600, 5400, "top1"),
    "resisc45": (25_200, 6300, "top1"),
}


@pytest.mark.parametrize("name", list_suites())
def test_every_card_of_a_suite_is_there_with_a_test_and_a_metric(name: str) -> None:
    for entry in load_suite(name).tasks:
        card = load_card(entry.card)
        assert card.name == entry.card and card.test_split in card.splits and "train" in card.splits
        assert card.metric in metrics.METRICS


def test_the_standard_suite_has_the_published_sizes_and_metrics() -> None:
    found = {}
    for entry in load_suite("standard").tasks:
        card = load_card(entry.card)
        fitted = sum(num for split, num in card.splits.items() if split != card.test_split)
        found[entry.card] = (fitted, card.splits[card.test_split], card.metric)
    assert found == PUBLISHED


def test_vtab1k_is_the_nineteen_tasks_by_the_published_split() -> None:
    suite = load_suite("vtab1k")
    assert [entry.card for entry in suite.tasks] == list(TASKS)
    assert all(method.settings.columns == (VTAB_IMAGES,) for method in suite.methods)
    for entry in suite.tasks:
        splits = load_card(entry.card).splits
        assert (splits["train"], splits["val"]) == (800, 200) and splits["test"] == TASKS[entry.card].counts()["test"]


def test_vtabs_reference_sees_the_whole_squeezed_image(digits: str) -> None:
    task = open_task(TaskEntry(card="digits", holdout_per_class=3), str(Path(digits).parent))
    augment = finetune_augment(SOURCE, task, load_suite("vtab1k").method("finetune"), 1000)
    assert (augment.crop, augment.flip, augment.eval_resize) == ("none", False, "plain")
    assert augment.image_px == augment.evaluation_px == 224


def test_digests_of_suites_that_sweeps_were_made_with_stay() -> None:
    """What a sweep's folder was claimed with: another digest would refuse to go on with it.

    few_shot_small_images is another protocol since logistic regression is that of its public code: its old sweeps are refused.
    """
    assert {name: load_suite(name).digest()[:16] for name in ("demo", "few_shot_small_images", "small_images")} == {
        "demo": "76c0919a6f805016",
        "few_shot_small_images": "4232860d4f6f288c",
        "small_images": "c5951f02055212a6",
    }


def sweep_of(suite: Suite, root: str, out: Path) -> Sweep:
    return Sweep(out=str(out), data_root=root, sources=(SOURCE,), suite=suite)


def test_tasks_that_are_not_prepared_are_listed_with_what_prepares_them(digits: str, tmp_path: Path) -> None:
    root = str(Path(digits).parent)
    demo = load_suite("demo")
    suite = Suite(
        name="s",
        title="s",
        tasks=(TaskEntry(card="pets", holdout_per_class=5), *demo.tasks, TaskEntry(card="glyphs", holdout_per_class=5)),
        methods=demo.methods,
        num_seeds=3,
    )
    cells, not_run = plan(sweep_of(suite, root, tmp_path))
    assert {cell.task for cell in cells} == {"digits"} and len(cells) == len(plan(sweep_of(demo, root, tmp_path))[0])
    assert [(row["task"], row["method"], row["shots"]) for row in not_run] == [("pets", "", None), ("glyphs", "", None)]
    assert f"normfree data prepare pets --source SOURCE --out {root}/pets" in not_run[0]["reason"]
    assert f"normfree data prepare glyphs --out {root}/glyphs" in not_run[1]["reason"]


def test_a_suite_without_any_prepared_task_is_refused(
    tmp_path: Path, make_checkpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestration.cli import main

    words = ["--suite", "standard", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["transfer", make_checkpoint(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert "the suite standard has nothing that these datasets can give" in said
    assert "normfree data prepare imagenet" in said and not (tmp_path / "out").exists()
