"""Parts of a split to fit and to choose on, two splits as one, falling rates, and what an evaluation is computed from."""

import numpy as np
import pytest
import torch
from PIL import Image

from nfnet.optim.schedule import step_rate
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import sample_rng, train_image
from pipeline.data.loading.datasets import DataConfig, EvalData, TrainData
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sampling.subset import Subset, select
from pipeline.data.sources.cards import load_card
from pipeline.distributed import join
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.training.evaluate import Scores, evaluate


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 train and 8 val images of noise in two classes."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.Generator(np.random.PCG64(0))
    for split, num in (("train", 12), ("val", 4)):
        for name in "ab":
            (folder / "raw" / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "raw" / split / name / f"{split}-{i}.png")
    prepare(load_card("images"), str(folder / "data"), source=str(folder / "raw"))
    return str(folder / "data")


def test_two_splits_as_one_give_each_image_once_an_epoch(noise: str) -> None:
    data = TrainData(DataConfig(url=noise, train_split="train+val"), AugmentConfig(image_px=8), seed=3)
    assert data.samples_per_epoch == 32 and data.digest == data.manifest.digest
    for epoch in range(3):
        seen = [k for step in range(8 * epoch, 8 * epoch + 8) for k in data.keys(step, 4)]
        assert len(seen) == len({(source, key) for source, _, _, key in seen}) == 32
    assert data.names == [f"{noise} (train)", f"{noise} (val)"]
    batch = next(data.batches(steps=range(8), global_batch=32, micro_batch=32, world=join()))
    assert not batch.lost and np.bincount(batch.labels.numpy()).tolist() == [16, 16]


def test_a_share_is_held_out_of_every_class_and_the_rest_is_fitted() -> None:
    labels = np.repeat([0, 1, 2], [10, 3, 40])
    rest = select(labels, Subset(per_class=0, holdout_share=0.2))
    held = select(labels, Subset(per_class=0, holdout_share=0.2, part="holdout"))
    assert sorted([*rest, *held]) == list(range(53)) and np.bincount(labels[held]).tolist() == [2, 1, 8]
    with pytest.raises(UserError, match="from 0 to below 1"):
        Subset(per_class=0, holdout_share=1.0)


def test_a_list_is_that_list_or_an_error() -> None:
    labels = np.zeros(5, np.int64)
    assert select(labels, Subset(per_class=0, listed=(3, 1))).tolist() == [1, 3]
    for listed in ((1, 1), (5,), (-1,)):
        with pytest.raises(UserError, match=r"does not fit|a whole number of 0 or more"):
            select(labels, Subset(per_class=0, listed=listed))


def test_rates_fall_to_a_tenth_after_each_boundary() -> None:
    rates = [step_rate(s, warmup_steps=2, peak=1.0, decay_steps=(4, 6)) for s in range(8)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01])
    optim = OptimConfig(learning_rate=1.0, schedule="steps", decay_steps=(4, 6))
    assert [optim.rate(s, total_steps=8, warmup_steps=2) for s in range(8)] == rates
    for wrong in ({"schedule": "steps"}, {"decay_steps": (3,)}, {"schedule": "steps", "decay_steps": (4, 4)}):
        with pytest.raises(UserError, match="decay_steps"):
            OptimConfig(learning_rate=1.0, **wrong)  # type: ignore[arg-type]


def test_the_resized_crop_is_a_window_of_the_whole_image_at_its_size() -> None:
    pixels = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    config = AugmentConfig(image_px=16, crop="resized", resized_px=20, flip=False)
    seen = set()
    for sample in range(40):
        image = train_image(pixels, config, sample_rng(0, 0, sample))
        places = [(t, x) for t in range(5) for x in range(5) if np.array_equal(image, pixels[t : t + 16, x : x + 16])]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 12
    with pytest.raises(UserError, match="resized_px"):
        AugmentConfig(image_px=16, crop="resized")


def test_an_evaluations_numbers_are_those_of_the_scores_that_it_hands_over(noise: str) -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    augment = AugmentConfig(image_px=8)
    found: list[Scores] = []
    data = EvalData(DataConfig(url=noise), augment)
    result = evaluate(network, data, augment, world=join(), batch_size=3, step=7, weights="raw", on_scores=found.append)
    (scores,) = found
    assert scores.step == 7 and scores.split == "val" and scores.samples.tolist() == list(range(8))
    assert (scores.logits.argmax(1) == scores.labels).mean() == pytest.approx(result.top1)
    loss = torch.nn.functional.cross_entropy(torch.tensor(scores.logits), torch.tensor(scores.labels))
    assert float(loss) == pytest.approx(result.loss, rel=1e-6)
