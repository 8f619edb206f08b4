"""Segmentation: masks as they were drawn, the metric as scikit-learn has it, the head as torch's own loop, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.masks import masks_of
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources import shapes
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.verify import verify
from pipeline.errors import UserError
from pipeline.training.check_run import check_loss
from tests.transfer import recompute
from tests.transfer.conftest import claimed_sweep
from transfer import metrics
from transfer.measurement import predictions
from transfer.probes import features, fit
from transfer.protocol.method_settings import RidgeSettings, SegmentSettings
from transfer.protocol.methods import Method
from transfer.protocol.own_data import default_suite
from transfer.protocol.tasks import TaskEntry, open_task
from transfer.report.write_report import write_report
from transfer.results.sweep_results import Findings, load_findings
from transfer.sweep import probe_job
from transfer.sweep.cells import plan
from transfer.sweep.sources import Backbone, refuse_without_maps

SETTINGS = SegmentSettings(split="full", learning_rates=(1e-3, 1e-2), num_steps=30, batch=8, train_mask_px=24)
METHOD = Method(name="segment", kind="segment", settings=SETTINGS)
SOURCE = Backbone(
    checkpoint_url="/runs/none",
    digest="",
    model="nfnet_tiny",
    options={},
    augment=AugmentConfig(image_px=32),
    name="nfnet_tiny",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("dense") / "shapes")
    prepare(load_card("shapes"), url, shard_samples=100)
    return url


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory, data: str) -> Findings:
    """A sweep of nfnet_tiny from fresh weights at 32 px, whose maps are 4 x 4."""
    out = tmp_path_factory.mktemp("sweep") / "s"
    sweep = claimed_sweep(out, data, SOURCE, (METHOD,), card="shapes", holdout=1, num_seeds=2)
    assert all(entry.is_ok for entry in probe_job.run_probes(sweep, plan(sweep)[0]))
    return load_findings(str(out))


def test_masks_come_back_as_they_were_drawn(data: str) -> None:
    found = Manifest.open(data)
    assert found.outputs == shapes.LABELS and found.classes == ("images",) and not verify(data).problems
    index = found.split("val")
    for key, mask in zip(index.keys, masks_of(index), strict=True):
        np.testing.assert_array_equal(mask, shapes.render(int(str(key).rpartition("_")[2]))[1])


def test_every_number_of_a_cell_is_scikit_learns(findings: Findings, data: str) -> None:
    """From the cached maps, by a head that is fitted again as torch's plain loop would, to the intersection over union."""
    task = open_task(TaskEntry(card="shapes", holdout_per_class=1), str(Path(data).parent))
    finals = sorted(findings.finals, key=lambda e: e.seed)
    assert [e.seed for e in finals] == [0, 1]
    for entry in finals:
        network = features.from_scratch("nfnet_tiny", {}, entry.seed)

        def maps(split: str, network: features.Backbone = network) -> tuple[np.ndarray, np.ndarray]:
            x, labels = features.extract(network.model, task, SOURCE.augment, split)
            return x, task.truth.of(labels, data, split)

        (x, y), (held, held_masks), (test, masks) = maps("train"), maps("val"), maps("test")
        x, y = np.concatenate([x, held]), np.concatenate([y, held_masks])
        scores = _plain_loop(x, y, test, rate=entry.hyperparameters["learning_rate"], seed=entry.seed)
        predicted = np.concatenate([recompute.bilinear(s, 96, 96).argmax(2).ravel() for s in scores])
        truth = np.concatenate([mask.ravel() for mask in masks])
        assert entry.value == pytest.approx(recompute.mean_iou(predicted, truth), abs=2e-3)
        assert entry.metrics["pixel_accuracy"] == pytest.approx((predicted == truth).mean(), abs=2e-3)
        shares = np.bincount(truth, minlength=6) / truth.size
        assert entry.baselines["majority"] == pytest.approx(shares[0] / 6) and shares[0] > 0.5
        chance = shares / 6 / (shares + 1 / 6 - shares / 6)
        assert entry.baselines["chance"] == pytest.approx(chance.mean())
        assert entry.num_train == 200 and entry.num_test == 80 and entry.metric == "miou"
        kept = findings.predictions(entry)
        assert kept is not None and predictions.recomputed("miou", kept) == entry.value
        assert findings.predicted_classes(entry) is None


def _plain_loop(x: np.ndarray, y: np.ndarray, test: np.ndarray, *, rate: float, seed: int) -> np.ndarray:
    """Scores (N, h, w, C) in float64 of the head as it is described, with torch's layers."""
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    mean, std = flat.mean(0), flat.std(0) + 1e-5
    layer = torch.nn.Conv2d(x.shape[-1], 6, 1).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, x.shape[-1], 1, 1, generator=generator) * 0.01)
        layer.bias.zero_()
    inputs = torch.tensor((x - mean) / std).permute(0, 3, 1, 2)
    # 96 pixels brought to 24: the middle two of each four are equally near, and the later one is taken.
    aims = torch.tensor(np.stack([mask[2::4, 2::4] for mask in y]).astype(np.int64))
    optimiser, order = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=1e-4), []
    for step in range(30):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / 30)
        if len(order) < 8:
            order += torch.randperm(len(x), generator=generator).tolist()
        rows, order = order[:8], order[8:]
        shown = torch.nn.functional.interpolate(layer(inputs[rows]), size=(24, 24), mode="bilinear")
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(shown, aims[rows], ignore_index=255).backward()
        optimiser.step()
    with torch.no_grad():
        return layer(torch.tensor((test - mean) / std).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def test_void_pixels_count_nowhere_and_masks_keep_their_size() -> None:
    rng = np.random.default_rng(0)
    masks = np.empty(3, object)
    masks[:] = [rng.choice([0, 1, 3, 255], size) for size in ((7, 9), (12, 5), (8, 8))]
    masks[:] = [mask.astype(np.uint8) for mask in masks]
    scores = rng.normal(size=(3, 4, 4, 5)).astype(np.float32)
    counts, pixels = fit.measured(scores, masks, 5)
    both = [
        (recompute.bilinear(s, *mask.shape).argmax(2)[mask != 255], mask[mask != 255])
        for s, mask in zip(scores, masks, strict=True)
    ]
    predicted, truth = (np.concatenate(column) for column in zip(*both, strict=True))
    assert metrics.compute("miou", counts, pixels) == pytest.approx(recompute.mean_iou(predicted, truth), abs=1e-12)
    assert metrics.compute("pixel_accuracy", counts, pixels) == pytest.approx((predicted == truth).mean(), abs=1e-12)
    assert pixels.sum() == truth.size


def test_a_report_of_masks_has_rows_of_its_unit(
    findings: Findings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(findings.folders[0].url, tmp_path)
    assert "mIoU, %" in capsys.readouterr().out and "mIoU" in (tmp_path / "scorecard.html").read_text()


def _list(folder: Path, mask: np.ndarray) -> str:
    rows = []
    for number, split in enumerate(("train", "val")):
        Image.fromarray(np.full((8, 6, 3), number * 90, np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask if number else np.zeros((8, 6), np.uint8)).save(folder / f"{number}_mask.png")
        rows.append({"path": f"{number}.png", "mask": f"{number}_mask.png", "split": split})
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "list.jsonl")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((6, 8), np.uint8), "val/1.png: its mask has 8 x 6 pixels and the image 6 x 8"),
        (np.full((8, 6), 6, np.uint8), "val/1.png: its mask has the class 6; there are 0 to 5, and 255 for none"),
        (np.zeros((8, 6, 3), np.uint8), "val/1.png: its mask is a PNG of mode RGB"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_with_its_file(tmp_path: Path, mask: np.ndarray, message: str) -> None:
    card = replace(load_card("shapes"), kind="folder", member=None)
    with pytest.raises(UserError, match=message):
        prepare(card, str(tmp_path / "out"), source=_list(tmp_path, mask))


def test_a_list_with_masks_is_prepared_and_void_is_kept(tmp_path: Path) -> None:
    card = replace(load_card("shapes"), kind="folder", member=None)
    mask = np.full((8, 6), 255, np.uint8)
    mask[2:4] = 5
    found = prepare(card, str(tmp_path / "out"), source=_list(tmp_path, mask))
    (read,) = masks_of(found.split("val"))
    np.testing.assert_array_equal(read, mask)


def test_a_prepared_set_whose_masks_alone_changed_is_another_source(tmp_path: Path) -> None:
    card = replace(load_card("shapes"), kind="folder", member=None)
    prepare(card, str(tmp_path / "out"), source=_list(tmp_path, np.zeros((8, 6), np.uint8)))
    mask = np.arange(48, dtype=np.uint8).reshape(8, 6) % 5
    with pytest.raises(UserError, match="source"):
        prepare(card, str(tmp_path / "out"), source=_list(tmp_path, mask))


def test_what_does_not_fit_is_said_before_a_trial(data: str) -> None:
    task = open_task(TaskEntry(card="shapes", holdout_per_class=1), str(Path(data).parent))
    assert "take the method segment" in (task.cannot(RidgeSettings(split="full"), 0) or "")
    assert "set metric to one of miou" in (task.cannot(replace(SETTINGS, metric="top1"), 0) or "")
    digits = replace(task, truth=type(task.truth)(), card=load_card("digits"))
    assert "has no masks" in (digits.cannot(SETTINGS, 0) or "")
    refuse_without_maps([SOURCE], [METHOD])
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 cannot segment: .* no rows and columns"):
        refuse_without_maps(
            [replace(SOURCE, model="timm:vit_tiny_patch16_224", augment=AugmentConfig(image_px=224))], [METHOD]
        )
    refuse_without_maps([SOURCE], [METHOD], [task])
    maps, _ = features.extract(features.from_scratch("nfnet_tiny", {}, 0).model, task, SOURCE.augment, "val")
    assert features.map_bytes("nfnet_tiny", {}, 32) * len(maps) == maps.nbytes
    large = replace(task, train_labels=np.zeros(1 << 26, np.int64))  # maps of 4 x 4 and 768 channels
    with pytest.raises(
        UserError, match=r"67,108,864 training images of shapes at 32 px by nfnet_tiny take 1,536 GiB, and 24 at"
    ):
        refuse_without_maps([SOURCE], [METHOD], [task, large])
    refuse_without_maps([SOURCE], [METHOD], [replace(large, truth=type(task.truth)())])  # another method's images
    suite, said = default_suite([data])
    assert [m.kind for m in suite.methods] == ["segment"] and said[
        0
    ] == "shapes: 160 training images, 6 classes of pixels"


def test_nothing_trains_on_images_without_a_class(data: str) -> None:
    from pipeline import recipes

    run = recipes.get("nfnet_tiny_cifar100")
    with pytest.raises(UserError, match=r"each pixel of .* has a class"):
        check_loss(replace(run, data=replace(run.data, url=data)))
