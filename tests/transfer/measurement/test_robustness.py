"""ImageNet-A, R and Sketch by the names of their folders; corruptions made while images are read."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.corruptions import corrupt
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import DataConfig, EvalData
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.models.evaluation_options import OfClasses
from transfer.protocol.imagenet_labels import columns_of

# Everybody's class indices (the labels of ILSVRC-2012): tench, stingray, hen, toilet tissue.
KNOWN = {"n01440764": 0, "n01498041": 6, "n01514859": 8, "n15075141": 999}


def test_folders_meet_a_heads_classes_by_wordnets_names() -> None:
    numbers = [str(i) for i in range(1000)]
    assert columns_of(list(KNOWN), numbers) == list(KNOWN.values())
    assert columns_of(["n02000000", "n03000000"], ["n03000000", "n01000000", "n02000000"]) == [2, 0]
    assert columns_of(["n02000000", "n09999999"], ["n02000000", "n03000000"]) is None  # a class that the head has not
    assert columns_of(["cat", "dog"], numbers) is None and columns_of(["cat"], ["cat", "dog"]) is None


def test_the_choice_is_among_the_classes_of_the_data() -> None:
    network = nn.Flatten()
    images = torch.randn(5, 1, 2, 2)
    assert torch.equal(OfClasses(network, [3, 1])(images), images.flatten(1)[:, [3, 1]])


@pytest.fixture(scope="module")
def imagenet_a(tmp_path_factory: pytest.TempPathFactory) -> str:
    from timm.data import ImageNetInfo

    folder = tmp_path_factory.mktemp("a")
    rng = np.random.default_rng(0)
    for name in ImageNetInfo().label_names()[2::5]:
        (folder / "imagenet-a" / name).mkdir(parents=True)
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "imagenet-a" / name / "0.png")
    out = str(folder / "out")
    prepare(load_card("imagenet_a"), out, source=str(folder / "imagenet-a"))
    return out


def test_a_test_of_some_classes_is_prepared_from_its_folders(imagenet_a: str) -> None:
    found = Manifest.open(imagenet_a)
    assert list(found.splits) == ["test"] and len(found.classes) == 200
    columns = columns_of(found.classes, [str(i) for i in range(1000)])
    assert columns == list(range(2, 1000, 5))


def test_corruptions_change_each_image_as_the_function_does_and_alike_in_any_batch(imagenet_a: str) -> None:
    augment = AugmentConfig(image_px=32)
    config = DataConfig(url=imagenet_a, eval_split="test")
    (plain,) = EvalData(config, augment).batches(200)
    change = partial(corrupt, "gaussian_noise", 3)
    (noisy,) = EvalData(config, augment, change=change).batches(200)
    small = [batch.images for batch in EvalData(config, augment, change=change).batches(64)]
    assert torch.equal(noisy.images, torch.cat(small))
    for i in (0, 7, 199):
        wanted = corrupt("gaussian_noise", 3, plain.images[i].numpy(), int(plain.samples[i]))
        assert np.array_equal(noisy.images[i].numpy(), wanted)
    assert Path(imagenet_a).is_dir() and not torch.equal(noisy.images, plain.images)
