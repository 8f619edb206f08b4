"""Features: cached equals uncached, the key sees what decides them, and the test split stays sealed."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError
from transfer.probes.features import extract, feature_digest, features, from_scratch
from transfer.protocol.sealed_splits import (
    Selection,
    open_test,
    openings,
    read_selection,
    selection_url,
    write_selection,
)
from transfer.protocol.tasks import Task, TaskEntry, open_task

AUGMENT = AugmentConfig(image_px=16, flip=False)


@pytest.fixture(scope="module")
def task(digits: str) -> Task:
    return open_task(TaskEntry(card="digits", holdout_per_class=10), str(Path(digits).parent))


def selection(task: Task, **changes: object) -> Selection:
    fields: dict[str, object] = {
        "task": task.name,
        "method": "ridge",
        "init": "scratch",
        "shots": 1,
        "hyperparameters": {"l2": 1024.0},
        "candidates": [],
        "protocol_digest": "p",
        "data_digest": task.data_digest,
        "checkpoint_digest": "",
    }
    return Selection(**{**fields, **changes})  # type: ignore[arg-type]


def test_cached_features_equal_extracted_ones_in_the_index_order(task: Task, tmp_path: Path) -> None:
    backbone = from_scratch("nfnet_tiny", {}, seed=0)
    url = write_selection(selection_url(str(tmp_path), "a"), selection(task))
    first = features(backbone, task, AUGMENT, str(tmp_path), test=open_test(task, url, trial="t"))
    again = features(backbone, task, AUGMENT, str(tmp_path), test=open_test(task, url, trial="t"))
    direct = extract(backbone.model, task, AUGMENT, "val", batch_size=97)
    assert len(list((tmp_path / "features").iterdir())) == 1
    assert first[0].shape == (697, backbone.model.num_features) and first[0].dtype == np.float32
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(first[0], direct[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(first[1], direct[1])


def test_the_key_sees_weights_transform_data_and_split() -> None:
    base = feature_digest("w", AUGMENT, "d", "train")
    others = [
        feature_digest("v", AUGMENT, "d", "train"),
        feature_digest("w", AugmentConfig(image_px=20), "d", "train"),
        feature_digest("w", AugmentConfig(image_px=16, interpolation="bilinear"), "d", "train"),
        feature_digest("w", AugmentConfig(image_px=16, eval_crop=0.9), "d", "train"),
        feature_digest("w", AugmentConfig(image_px=16, eval_resize="aspect"), "d", "train"),
        feature_digest("w", AUGMENT, "e", "train"),
        feature_digest("w", AUGMENT, "d", "val"),
    ]
    assert len({base, *others}) == 8
    # How training images are cropped and mirrored does not reach features.
    assert feature_digest("w", AugmentConfig(image_px=16, flip=True, area_min=0.9), "d", "train") == base


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    digests = [from_scratch("nfnet_tiny", {}, seed=s).digest for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_the_test_split_opens_for_a_written_selection_only_and_each_opening_is_recorded(
    task: Task, tmp_path: Path
) -> None:
    url = selection_url(str(tmp_path), "a")
    with pytest.raises(UserError, match="stays closed"):
        open_test(task, url, trial="t")
    with pytest.raises(ValueError, match="opens for a selection record"):
        features(from_scratch("nfnet_tiny", {}, seed=0), task, AUGMENT, str(tmp_path), split="val")
    assert not openings(str(tmp_path))
    assert write_selection(url, selection(task)) == url
    assert open_test(task, url, trial="t").name == "val"
    open_test(task, url, trial="t")
    found = openings(str(tmp_path))
    assert [(o.trial, o.selection_url, o.task) for o in found] == [("t", url, "digits")] * 2
    assert found[0].selection_sha256 == hashlib.sha256(Path(url).read_bytes()).hexdigest()
    assert found[0].time_s >= read_selection(url).time_s
    other = selection_url(str(tmp_path), "b")
    write_selection(other, selection(task, data_digest="other", shots=5))
    with pytest.raises(UserError, match="was written for"):
        open_test(task, other, trial="t")
    assert len(openings(str(tmp_path))) == 2


def test_a_choice_is_not_revised(task: Task, tmp_path: Path) -> None:
    url = write_selection(selection_url(str(tmp_path), "a"), selection(task))
    time_s = read_selection(url).time_s
    write_selection(url, selection(task))
    assert read_selection(url).time_s == time_s
    with pytest.raises(UserError, match="has chosen"):
        write_selection(url, selection(task, hyperparameters={"l2": 1.0}))
