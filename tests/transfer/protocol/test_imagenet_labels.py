"""ReaL and ImageNet-V2 next to ImageNet: the published label file, timm's count, folders by number, and the seal."""

import csv
import dataclasses
import io
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import distributed
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import DataConfig, EvalData
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from pipeline.models.backbone import load_backbone
from pipeline.training.evaluate import Scores, evaluate
from tests.transfer.conftest import WEIGHTS, standing_in
from transfer.measurement import extra_test_sets, predictions
from transfer.protocol.imagenet_labels import is_extra, load_real, real_sets
from transfer.protocol.method_settings import FinetuneSettings, RidgeSettings
from transfer.protocol.methods import Method, sha256
from transfer.protocol.sealed_splits import open_other, openings
from transfer.protocol.tasks import Suite, Task, TaskEntry, open_task, task_protocol
from transfer.report.html_tables import scorecard_table
from transfer.report.scorecard_csv import to_csv
from transfer.report.write_report import print_table
from transfer.results.scorecard import scorecard, with_extra_metrics
from transfer.sweep import probe_job, trials
from transfer.sweep.cells import Cell, Sweep, plan
from transfer.sweep.entry import LedgerEntry
from transfer.sweep.ledger import Ledger
from transfer.sweep.sources import Backbone

WNIDS = [f"n{1_000_000 + 7 * i:08d}" for i in range(1000)]
NUM_VAL, SIDE = 60, 12
RIDGE = Method(name="ridge", kind="ridge", settings=RidgeSettings(shots=(1,)))


def published() -> list[list[int]]:
    """real.json as it was published; timm carries it."""
    content = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert content is not None
    return json.loads(content)


def picture(label: int, path: Path) -> None:
    """Every image of a class is the same, so that what a head says is known beforehand."""
    pixels = np.random.default_rng(label).integers(0, 256, (SIDE, SIDE, 1), np.uint8).repeat(3, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def name_of(key: str) -> str:
    """The file name without its end; keys begin with the class."""
    return str(key)[str(key).index("ILSVRC") :] if "ILSVRC" in str(key) else str(key).rpartition("_")[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """real.json, a small ImageNet whose val images show the first class that ReaL gives them, and an ImageNet-V2.

    Every fourth of the val images shows a class that is not among its ReaL labels; 30 of 40 of V2 lie in the right folder.
    """
    folder = tmp_path_factory.mktemp("imagenet")
    real = published()
    (folder / "real.json").write_text(json.dumps(real))
    for label, wnid in enumerate(WNIDS):
        for copy in range(2):
            picture(label, folder / "raw" / "train" / wnid / f"{copy}.png")
    for number in range(1, NUM_VAL + 1):
        right = real[number - 1]
        shown = (right[0] if right else 5) if number % 4 else next(c for c in range(1000) if c not in right)
        truth = WNIDS[right[-1] if right else 5]
        picture(shown, folder / "raw" / "val" / truth / f"ILSVRC2012_val_{number:08d}.png")
    for index in range(40):
        label = 25 * index
        picture(label if index % 4 else label + 1, folder / "v2-format-val" / str(label) / f"{index:x}.png")
    prepare(load_card("imagenet"), str(folder / "imagenet"), source=str(folder / "raw"))
    prepare(load_card("imagenet_v2"), str(folder / "v2"), source=str(folder / "v2-format-val"))
    return folder


def make_sweep(root: Path, out: Path, method: Method = RIDGE, **stated: str) -> Sweep:
    source = Backbone(
        checkpoint_url="/runs/pixels",
        digest=WEIGHTS,
        model="nfnet_tiny",
        options={},
        augment=AugmentConfig(image_px=16),
    )
    entry = TaskEntry(card="imagenet", holdout_per_class=1, **stated)
    suite = Suite(name="s", title="s", tasks=(entry,), methods=(method,), num_seeds=1)
    return Sweep(out=str(out), data_root=str(root), sources=(source,), suite=suite)


@pytest.fixture(scope="module")
def measured(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, LedgerEntry]:
    """A ridge probe of pixels with both stated."""
    sweep = make_sweep(root, tmp_path_factory.mktemp("sweep"), real_labels="real.json", v2=str(root / "v2"))
    cells = [c for c in plan(sweep)[0] if c.init == "pretrained"]
    with standing_in():
        (found,) = probe_job.run_probes(sweep, cells)
    assert found.is_ok, found.error
    return sweep, found


def test_real_of_a_trial_equals_timms_count_on_the_published_labels(
    root: Path, measured: tuple[Sweep, LedgerEntry]
) -> None:
    from timm.data.real_labels import RealLabelsImagenet

    sweep, found = measured
    said = predictions.read(sweep.out, found.digest)
    keys = Manifest.open(str(root / "imagenet")).split("val").keys
    names = [f"{name_of(keys[int(s)])}.JPEG" for s in said["sample"]]
    assert sorted(names) != names  # prepared splits are shuffled: the number in the name counts, not the place
    rest = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(NUM_VAL + 1, 50_001)]
    timm_model = RealLabelsImagenet([*names, *rest], real_json=str(root / "real.json"), topk=(1,))
    timm_model.add_result(torch.eye(1000)[torch.from_numpy(said["predicted"])])
    assert found.metrics["real_top1"] == pytest.approx(timm_model.get_accuracy(1) / 100)
    assert 0.6 < found.metrics["real_top1"] < 0.85 and found.metrics["real_top1"] != found.metrics["top1"]


def test_the_report_holds_both_beside_the_tasks_own_number(
    measured: tuple[Sweep, LedgerEntry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = measured
    (row,) = scorecard([found])
    assert [r.metric for r in with_extra_metrics([row])] == ["top1", "real_top1", "v2_top1"] and row.metric == "top1"
    print_table([row])
    text = capsys.readouterr().out
    lines = {r["metric"]: r for r in csv.DictReader(io.StringIO(to_csv([row])))}
    assert float(lines["real_top1"]["pretrained_mean"]) == found.metrics["real_top1"]
    assert float(lines["v2_top1"]["pretrained_mean"]) == 0.75 and float(lines["top1"]["pretrained_mean"]) == found.value
    page = scorecard_table([row])
    for title, value in (("ReaL accuracy", found.metrics["real_top1"]), ("accuracy on ImageNet-V2", 0.75)):
        assert re.search(rf"{title} .*{100 * value:.1f}", text)
        assert re.search(rf"{title}</span></td>(?s:.*?)>{100 * value:.1f}<", page)


def test_v2_counts_by_the_number_of_the_folder(measured: tuple[Sweep, LedgerEntry]) -> None:
    assert measured[1].metrics["v2_top1"] == 0.75


def test_the_card_takes_the_published_tree_and_its_folders_for_labels(root: Path) -> None:
    manifest = Manifest.open(str(root / "v2"))
    assert set(manifest.splits) == {"test"} and manifest.classes[10] == "10"
    index = manifest.split("test")
    assert sorted(index.label.tolist()) == [25 * i for i in range(40)]
    assert all(int(name_of(key), 16) * 25 == label for key, label in zip(index.keys, index.label, strict=True))


def test_both_open_after_the_selection_and_each_opening_is_recorded(measured: tuple[Sweep, LedgerEntry]) -> None:
    sweep, found = measured
    task = sweep.task("imagenet")
    assert [(o.what, o.trial, o.data_digest) for o in openings(sweep.out)] == [
        ("test", found.digest, task.data_digest),
        ("ImageNet-V2", found.digest, task.extra_tests.others[0].digest),
    ]
    with pytest.raises(UserError, match="stays closed"):
        open_other(task, task.extra_tests.others[0], f"{sweep.out}/selection/none.json", trial="t")
    assert len(openings(sweep.out)) == 2


def test_labels_decide_the_protocol_where_they_are_stated_and_only_there(root: Path, tmp_path: Path) -> None:
    def protocol(**stated: str) -> dict[str, Any]:
        return task_protocol(make_sweep(root, tmp_path, **stated).task("imagenet"), RIDGE, {})

    other = published()
    other[0] = [1, 2, 3]
    (tmp_path / "other.json").write_text(json.dumps(other))
    found = [protocol(), protocol(real_labels="real.json"), protocol(real_labels=str(tmp_path / "other.json"))]
    found.append(protocol(v2="v2"))
    assert "beside" not in found[0] and len({sha256(p) for p in found}) == 4
    # Where the file lies does not.
    (tmp_path / "real.json").write_bytes((root / "real.json").read_bytes())
    assert protocol(real_labels=str(tmp_path / "real.json")) == found[1]


def test_a_sweep_keeps_what_its_suite_states(root: Path, tmp_path: Path) -> None:
    from transfer.protocol.suite_files import suite_of

    suite = make_sweep(root, tmp_path, real_labels="real.json", v2="v2").suite
    assert suite_of(suite.plain(), "x") == dataclasses.replace(suite, num_seeds=1)
    assert suite.digest() != make_sweep(root, tmp_path).suite.digest()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"real_labels": "gone.json"}, "cannot read .*gone.json"),
        ({"real_labels": "imagenet/manifest.json"}, "not the label sets"),
        ({"v2": "imagenet"}, "not 0 to 999 in order; prepare it with the card imagenet_v2"),
        ({"v2": "gone"}, "there is no dataset at"),
    ],
)
def test_what_is_stated_and_wrong_is_refused_before_anything_runs(
    root: Path, tmp_path: Path, stated: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(make_sweep(root, tmp_path, **stated))


def test_other_tasks_have_no_such_labels(digits: str, root: Path) -> None:
    entry = TaskEntry(card="digits", holdout_per_class=1, real_labels=str(root / "real.json"))
    with pytest.raises(UserError, match="not ImageNet's 1,000 wnids"):
        open_task(entry, str(Path(digits).parent))


def test_a_fine_tuned_network_is_measured_on_v2_with_the_weights_that_the_test_saw(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V2 made of images that are in val: equal scores, image by image."""
    keys = Manifest.open(str(root / "imagenet")).split("val")
    wanted: dict[int, str] = {}
    for key, label in zip(keys.keys, keys.label.tolist(), strict=True):
        wanted.setdefault(label, name_of(key))
    for label, name in wanted.items():
        (raw,) = (root / "raw" / "val").rglob(f"{name}.png")
        path = tmp_path / "raw" / str(label) / f"{name}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(raw.read_bytes())
    prepare(load_card("imagenet_v2"), str(tmp_path / "v2"), source=str(tmp_path / "raw"))
    settings = FinetuneSettings(shots=(1,), learning_rates=(0.5,), num_steps=(2,), batch=16, ema_decay=0.5)
    method = Method(name="finetune", kind="finetune", settings=settings)
    sweep = make_sweep(root, tmp_path / "sweep", method, real_labels="real.json", v2=str(tmp_path / "v2"))
    cell: Cell = next(c for c in plan(sweep)[0] if c.init == "scratch")
    point = dict(cell.points[0])
    cell.select(sweep.out, point, [])
    seen: list[tuple[np.ndarray, ...]] = []
    real_numbers = extra_test_sets.numbers

    def spy(task: Task, opened: Any, *, score: Any, **rest: Any) -> dict[str, float]:
        def kept(*words: Any) -> tuple[np.ndarray, np.ndarray]:
            seen.append((rest["samples"], rest["scores"], *score(*words)))
            return seen[-1][2], seen[-1][3]

        return real_numbers(task, opened, score=kept, **rest)

    monkeypatch.setattr(extra_test_sets, "numbers", spy)
    found = trials.run_finetune(sweep, cell.finals(point, 1)[0], lambda row: None)
    assert found is not None and found.is_ok and {*filter(is_extra, found.metrics)} == {"real_top1", "v2_top1"}
    ((samples, scores, other, labels),) = seen
    place = {name_of(key): i for i, key in enumerate(keys.keys)}
    row = {int(s): i for i, s in enumerate(samples)}
    own = np.stack([scores[row[place[wanted[int(label)]]]] for label in labels])
    assert np.abs(own).max() > 0.01  # the head has left zero
    np.testing.assert_allclose(other, own, atol=1e-5)
    assert found.metrics["v2_top1"] == pytest.approx(float((other.argmax(1) == labels).mean()))
    assert Ledger(sweep.out).find(found.digest) == found and not (tmp_path / "sweep" / "work" / found.digest).exists()


@pytest.mark.parametrize("classes", [WNIDS, [str(i) for i in range(1000)]])
def test_evaluate_says_real_of_a_checkpoint_and_takes_v2(
    root: Path, tmp_path: Path, make_checkpoint: Any, capsys: pytest.CaptureFixture[str], classes: list[str]
) -> None:
    from orchestration.cli import main

    url = make_checkpoint(tmp_path, classes=classes)
    loaded, kept = load_backbone(url), list[Scores]()
    data = EvalData(DataConfig(url=str(root / "imagenet")), loaded.augment, split="val")
    evaluate(
        loaded.model,
        data,
        loaded.augment,
        world=distributed.join(),
        batch_size=7,
        step=0,
        weights="evaluated",
        on_scores=kept.append,
    )
    labels: list[list[int]] = [[] for _ in range(50_000)]  # a third wrong, and a fifth without any
    for number, (sample, row) in enumerate(zip(kept[0].samples, kept[0].logits, strict=True)):
        said = int(row.argmax()) if number % 3 else int(row.argmin())
        labels[int(name_of(data.index.keys[int(sample)])[-8:]) - 1] = [said] if number % 5 else []
    (tmp_path / "real.json").write_text(json.dumps(labels))
    assert main(["evaluate", url, str(root / "imagenet"), "--real-labels", str(tmp_path / "real.json")]) == 0
    out = capsys.readouterr().out
    assert "on val of" in out and "60 images" in out and f"ReaL {32 / 48:.2%}" in out
    assert main(["evaluate", url, str(root / "v2")]) == 0
    assert "on test of" in capsys.readouterr().out
    assert main(["evaluate", url, str(root / "v2"), "--real-labels", str(root / "real.json")]) == 2


def test_real_json_goes_by_the_number_in_the_file_name(tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[i % 1000] if i % 3 else [] for i in range(50_000)]))
    real = load_real(str(path))
    names = ["val/n01440764/ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00050000", "ILSVRC2012_val_00000001.JPEG"]
    assert real_sets(real, names) == [(1,), (999,), ()]
    for wrong in ("ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG", "n01440764_10026.JPEG"):
        with pytest.raises(UserError, match="ReaL has labels for"):
            real_sets(real, [wrong])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("[", "cut short"),
        ("[[1], [2]]", "a list of 2"),
        ("{}", "a dict"),
        (json.dumps([[0]] * 49_999 + [[1000]]), "image 50000"),
    ],
)
def test_files_that_are_not_real_json_are_refused_in_one_sentence(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "real.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_real(str(path))
