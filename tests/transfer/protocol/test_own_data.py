"""Images that come without a suite: what is prepared, which protocol they get, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from transfer.protocol import own_data
from transfer.protocol.own_data import default_suite, prepared
from transfer.protocol.tasks import open_task


def photos(folder: Path, classes: dict[str, int]) -> Path:
    draw = np.random.default_rng(0)
    for name, num in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(num):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("own")
    return prepared(str(photos(folder / "My Cats", {"tabby": 20, "siamese": 30})), str(folder / "sweep"))


def test_a_folder_is_prepared_below_the_sweep_with_a_fifth_held_out_and_once(cats: str) -> None:
    assert cats.endswith("sweep/data/my_cats") and prepared(cats, "elsewhere") == cats
    found = Manifest.open(cats)
    sizes = {name: split.num_samples for name, split in found.splits.items()}
    assert sum(sizes.values()) == 50 and 2 <= sizes["val"] <= 20


def test_a_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    photos(tmp_path / "p" / "train", {"a": 3, "b": 3})
    photos(tmp_path / "p" / "test", {"a": 1, "b": 2})
    found = Manifest.open(prepared(str(tmp_path / "p"), str(tmp_path / "s")))
    assert {name: split.num_samples for name, split in found.splits.items()} == {"train": 6, "test": 3}
    assert prepared(str(tmp_path / "p"), str(tmp_path / "s")) == found.url  # the same command again


def test_the_protocol_follows_from_the_size_and_is_told(
    cats: str, digits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, told = default_suite([cats, digits])
    assert [t.name for t in suite.tasks] == ["my_cats", "digits"] and [t.card for t in suite.tasks] == [
        "images",
        "digits",
    ]
    assert [m.name for m in suite.methods] == ["ridge", "knn", "logistic"] and suite.num_seeds == 3
    assert suite.method("ridge").settings.shots == (1, 5, 10, 25)  # of what the largest smallest class can give
    assert suite.tasks[1].holdout_per_class == 10 > suite.tasks[0].holdout_per_class >= 1
    assert "my_cats: " in told[0] and "2 classes" in told[0] and "ridge on frozen features at 1, 5, 10, 25" in told[-1]
    small, _ = default_suite([cats])
    assert max(small.method("ridge").settings.shots) <= 20
    assert open_task(small.tasks[0], "").name == "my_cats"
    monkeypatch.setattr(own_data, "MANY_IMAGES", 10)
    assert [m.name for m in default_suite([cats])[0].methods] == ["ridge", "knn", "linear"]
    chosen, _ = default_suite([cats], ["finetune", "hyperrule"])
    assert [m.name for m in chosen.methods] == ["finetune", "hyperrule"]


def test_what_is_no_task_is_refused_in_a_sentence(tmp_path: Path, cats: str) -> None:
    with pytest.raises(UserError, match="no images"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "a.txt").write_text("x")
        prepared(str(tmp_path / "empty"), str(tmp_path / "s"))
    with pytest.raises(UserError, match="has one class"):
        default_suite([prepared(str(photos(tmp_path / "one", {"a": 9})), str(tmp_path / "s"))])
    with pytest.raises(UserError, match="two datasets would be the task my_cats"):
        default_suite([cats, cats])
    with pytest.raises(UserError, match="--methods has 'rigde'; did you mean 'ridge'"):
        default_suite([cats], ["rigde"])
    with pytest.raises(UserError, match="no dataset at"):
        default_suite([str(tmp_path)])
