"""Detection: the head is torchvision's FCOS, cells are recomputed from what was drawn, and refusals come before a trial."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources import shapes
from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from pipeline.models.backbone import make
from tests.transfer import recompute
from tests.transfer.conftest import claimed_sweep
from transfer.measurement import predictions, reference_values
from transfer.probes import detect, pyramid
from transfer.protocol.method_settings import DetectSettings, RidgeSettings
from transfer.protocol.methods import Method
from transfer.protocol.own_data import default_suite
from transfer.protocol.tasks import TaskEntry, open_task
from transfer.report.write_report import write_report
from transfer.results.scorecard import scorecard
from transfer.results.sweep_results import Findings, load_findings
from transfer.sweep import probe_job
from transfer.sweep.cells import plan
from transfer.sweep.sources import Backbone, refuse_without_maps

SETTINGS = DetectSettings(split="full", learning_rates=(3e-3,), num_steps=12, batch=4, width=32)
METHOD = Method(name="detect", kind="detect", settings=SETTINGS)
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
    url = str(tmp_path_factory.mktemp("detection") / "shape_boxes")
    prepare(load_card("shape_boxes"), url)
    return url


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory, data: str) -> Findings:
    """A sweep of nfnet_tiny from fresh weights at 32 px, of one seed."""
    out = tmp_path_factory.mktemp("sweep") / "s"
    sweep = claimed_sweep(out, data, SOURCE, (METHOD,), card="shape_boxes", holdout=1, num_seeds=1)
    with pytest.MonkeyPatch.context() as patched:  # an interval of a tenth of the resamples
        patched.setattr(reference_values, "NUM_RESAMPLES", 100)
        assert all(entry.is_ok for entry in probe_job.run_probes(sweep, plan(sweep)[0]))
    return load_findings(str(out))


def _drawn(data: str, split: str) -> list[list[tuple]]:
    """The boxes as they were drawn, by the name of each image."""
    found = []
    for key in Manifest.open(data).split(split).keys:
        _, _, boxes = shapes.render(int(str(key).rpartition("_")[2]))
        found.append([(b.label, b.crowd, b.left, b.top, b.right, b.bottom) for b in boxes])
    return found


def test_a_cell_is_recomputed_from_its_detections_and_what_was_drawn(findings: Findings, data: str) -> None:
    (entry,) = findings.finals
    kept = findings.predictions(entry)
    assert kept is not None and (entry.metric, entry.num_train, entry.num_test) == ("box_map", 200, 80)
    found = [
        [(r["score"], int(r["label"]), *(r["edges"] * 96)) for r in row if r["label"] >= 0] for row in kept["scores"]
    ]
    assert sum(map(len, found)) > 500
    for name, num in (("box_map", 10), ("box_map50", 1)):
        ious = [0.5 + i / 20 for i in range(num)]
        assert entry.metrics[name] == pytest.approx(
            recompute.box_precision(found, _drawn(data, "test"), ious), abs=1e-6
        )
    assert predictions.recomputed("box_map", kept) == entry.value == entry.metrics["box_map"]
    assert 0 < entry.baselines["chance"] < 0.02


def test_one_seed_has_the_interval_of_its_test_images_and_a_row_of_its_unit(
    findings: Findings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,), (row,) = findings.finals, scorecard(findings.finals)
    assert entry.test_interval is not None and row.scratch is not None
    assert (row.scratch.low, row.scratch.high) == (entry.test_interval["low"], entry.test_interval["high"])
    assert row.scratch.rule == "bootstrap" and row.scratch.low < row.scratch.high
    write_report(findings.folders[0].url, tmp_path)
    assert "mAP 50:95, %" in capsys.readouterr().out and "mAP 50" in (tmp_path / "scorecard.html").read_text()


def test_the_detector_is_torchvisions_with_maps_for_images() -> None:
    """Losses and detections of the whole of torchvision's FCOS, whose backbone gives the same maps for any image."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 5, 8, 8), torch.randn(2, 7, 4, 4)]
    stats = [(np.full(c, 0.1, np.float32), np.full(c, 2.0, np.float32)) for c in (5, 7)]
    ours = detect.Detector(detect._Pyramid([5, 7], 32, stats), 3, 64, replace(SETTINGS, min_score=0.0))
    ours.head.classification_head.cls_logits.weight.data.mul_(30)
    scaled = OrderedDict((str(i), (x - 0.1) / 2.0) for i, x in enumerate(maps))

    class Given(torch.nn.Module):
        out_channels = 32

        def forward(self, images: torch.Tensor) -> OrderedDict:
            return ours.backbone.fpn(scaled)

    sizes = ((8,), (16,), (32,), (64,))
    theirs = FCOS(
        Given(),
        3,
        min_size=64,
        max_size=64,
        anchor_generator=AnchorGenerator(sizes, ((1.0,),) * 4),
        head=ours.head,
        score_thresh=0.0,
    )
    images = [torch.rand(3, 64, 64)] * 2
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 50]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    (losses,), expected = ours(maps, targets), theirs.train()(images, targets)
    assert losses.keys() == expected.keys() and all(torch.equal(losses[k], expected[k]) for k in losses)
    for mine, other in zip(ours.eval()(maps), theirs.eval()(images), strict=True):
        assert len(mine["boxes"]) == 100 and all(torch.equal(mine[k], other[k]) for k in mine)


def test_a_head_finds_what_the_maps_show_and_nothing_in_maps_of_other_images() -> None:
    from pipeline.data.format.boxes import Boxes
    from transfer import box_precision

    draw = np.random.default_rng(0)
    maps = np.zeros(40, [("0", np.float16, (3, 16, 16)), ("1", np.float16, (3, 8, 8))])
    truth = []
    for row in maps:
        x, y, label = *(draw.integers(1, 9, 2)), int(draw.integers(2))
        row["0"][label, y : y + 6, x : x + 6] = 1
        row["0"][2] = draw.normal(0, 0.1, (16, 16))
        row["1"][:] = row["0"][:, ::2, ::2]
        truth.append(
            Boxes(160, 80, np.array([[x, y, x + 6, y + 6]]) * [10.0, 5, 10, 5], np.array([label]), np.array([False]))
        )
    counts, settings = np.stack([b.counts(2) for b in truth[28:]]), replace(SETTINGS, num_steps=60, batch=8)
    reached = []
    for shown in (maps, maps[np.roll(np.arange(40), 5)]):
        (head,) = detect.fit_detect(shown[:28], truth[:28], 2, settings=settings, rates=[5e-3], seed=0)
        found = box_precision.matched(head.detections(shown[28:]), truth[28:])
        reached.append(box_precision.precision(found, counts, slice(1)))
    assert reached[0] > 0.7 and reached[1] < 0.3, reached


@pytest.mark.parametrize(
    ("name", "options", "px", "strides"),
    [
        ("nfnet_f0", {}, 64, (8, 16, 32)),
        ("nfnet_tiny", {}, 32, (4, 8)),
        ("timm:resnet18", {}, 64, (8, 16, 32)),
        ("timm:swin_tiny_patch4_window7_224", {}, 224, (8, 16, 32)),
        ("trunk:resnet50_v2", {"method": "group_norm"}, 64, (8, 16, 32)),
        ("trunk:resnet_v2_tiny", {"method": "normalizer_free"}, 32, (4, 8)),
    ],
)
def test_the_three_coarsest_maps_are_taken(name: str, options: dict, px: int, strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        found = make(name, 2, options).eval().forward_intermediates(torch.zeros(1, 3, px, px))
    assert tuple(px // one.shape[2] for one in pyramid.levels(found, px)) == strides
    assert pyramid.pyramid_bytes(name, options, px) == 2 * sum(one.numel() for one in pyramid.levels(found, px))


def test_the_last_map_is_what_the_head_pools() -> None:
    for name, options in (
        ("nfnet_tiny", {}),
        ("trunk:resnet_v2_tiny", {"method": "batch_norm"}),
        ("timm:test_resnet", {}),
    ):
        network, images = make(name, 2, options).eval(), torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            assert torch.equal(network.forward_intermediates(images)[-1], network.forward_features(images))


@pytest.mark.parametrize(
    ("model", "px", "message"),
    [
        ("timm:vit_tiny_patch16_224", 224, r"cannot detect: it has no maps at several resolutions \(all of 14 x 14"),
        ("timm:resnet18", 80, r"cannot detect: images of 80 px .*; set image_px to a multiple of 32"),
    ],
)
def test_a_backbone_without_maps_at_several_resolutions_is_refused_before_a_trial(
    model: str, px: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        refuse_without_maps([replace(SOURCE, model=model, augment=AugmentConfig(image_px=px))], [METHOD])


def test_what_does_not_fit_is_said_before_a_trial(data: str) -> None:
    task = open_task(TaskEntry(card="shape_boxes", holdout_per_class=1), str(Path(data).parent))
    assert "images have boxes; take the method detect" in (task.cannot(RidgeSettings(split="full"), 0) or "")
    assert "set metric to one of box_map, box_map50" in (task.cannot(replace(SETTINGS, metric="top1"), 0) or "")
    assert task.cannot(replace(SETTINGS, metric="box_map50"), 0) is None
    digits = replace(task, truth=type(task.truth)(), card=load_card("digits"))
    assert "has no boxes" in (digits.cannot(SETTINGS, 0) or "")
    suite, said = default_suite([data])
    assert [m.kind for m in suite.methods] == ["detect"]
    assert said[0] == "shape_boxes: 160 training images, 5 classes of boxes"


def test_detections_that_were_changed_are_refused(findings: Findings) -> None:
    (entry,) = findings.finals
    kept = findings.predictions(entry)
    assert kept is not None
    plain = {"value": entry.value, "metric": entry.metric, "metrics": entry.metrics, "num_test": entry.num_test}
    assert not predictions.contradiction(plain, kept)
    kept["scores"]["right"][kept["scores"]["label"] >= 0] = 1
    assert "its predictions give" in predictions.contradiction(plain, kept)
