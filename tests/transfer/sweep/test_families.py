"""Every backbone fine-tuned by the recipe of its own family: which family, which recipe, and that it trains."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pipeline.errors import UserError
from pipeline.models.families import kind_of
from pipeline.training.run import Run
from transfer.protocol.methods import parse_methods
from transfer.protocol.recipes.families import ADAMW
from transfer.protocol.tasks import Suite, TaskEntry
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.finetune import finetune_run
from transfer.sweep.sources import Backbone, open_source, recipes_told
from transfer.sweep.trials import run_finetune

TINY = {"test_resnet": "resnet", "test_vit": "vit", "test_convnext": "convnext", "test_nfnet": "nfnet"}


@pytest.mark.parametrize(
    ("model", "options", "family", "has_batch_norm"),
    [
        ("nfnet_f0", {}, "nfnet", False),
        ("nf_resnet50", {}, "nfnet", False),
        ("timm:resnet50.a1_in1k", {}, "resnet", True),
        ("timm:resnetv2_50x1_bit.goog_in21k", {}, "resnet", False),
        ("timm:dm_nfnet_f0", {}, "nfnet", False),
        ("timm:vit_base_patch16_224", {}, "vit", False),
        ("timm:deit3_small_patch16_224", {}, "vit", False),
        ("timm:beit_base_patch16_224", {}, "vit", False),
        ("timm:convnext_tiny", {}, "convnext", False),
        ("timm:swin_tiny_patch4_window7_224", {}, "swin", False),
        ("trunk:resnet_v2_tiny", {"method": "batch_norm"}, "resnet", False),
        ("trunk:resnet_v2_tiny", {"method": "normalizer_free"}, "nfnet", False),
    ],
)
def test_networks_have_their_family(model: str, options: dict[str, Any], family: str, has_batch_norm: bool) -> None:
    found = kind_of(model, options)
    assert (found.family, found.has_batch_norm, found.guess) == (family, has_batch_norm, "")


@pytest.mark.parametrize(
    ("model", "taken", "why"),
    [("timm:hgnetv2_b0", "resnet", "has batch"), ("timm:gmlp_ti16_224", "vit", "no batch")],
)
def test_what_an_unknown_make_is_taken_for_is_said(model: str, taken: str, why: str) -> None:
    found = kind_of(model, {})
    assert found.family == taken and f"taken for {taken}" in found.guess and why in found.guess


def made(digits: str, tmp_path: Path, sources: tuple[Backbone, ...], **settings: Any) -> Sweep:
    methods = parse_methods({"by_family": {"shots": [5], **settings}}, "x")
    entry = TaskEntry(card="digits", holdout_per_class=2)
    suite = Suite(name="s", title="s", tasks=(entry,), methods=methods, num_seeds=1)
    root = str(Path(digits).parent)
    return Sweep(out=str(tmp_path / "sweep"), data_root=root, sources=sources, suite=suite, scheduler="none")


def source(name: str, tmp_path: Path) -> Backbone:
    torch.manual_seed(0)
    file = tmp_path / f"{name}.pth"
    torch.save(timm.create_model(name).state_dict(), file)
    found = open_source(f"timm:{name}@{file}")
    return dataclasses.replace(found, augment=dataclasses.replace(found.augment, image_px=160))


def runs(sweep: Sweep) -> dict[str, Run]:
    found = {}
    cells, _ = plan(sweep)
    assert len({cell.any_trial.protocol_digest for cell in cells}) == 1  # one protocol for all backbones
    for cell in cells:
        own = sweep.source_of(cell.any_trial)
        given = {"init": cell.init, "shots": 5, "seed": 0, "test": None, "hyperparameters": cell.points[0]}
        found[own.model, cell.init] = finetune_run(own, sweep.task("digits"), sweep.suite.methods[0], **given)
    return {model: run for (model, init), run in found.items() if init == "pretrained"}


def test_each_family_has_the_numbers_of_its_source(digits: str, tmp_path: Path) -> None:
    sweep = made(digits, tmp_path, tuple(source(name, tmp_path) for name in TINY))
    found = runs(sweep)
    resnet, vit, convnext, nfnet = (found[f"timm:{name}"].optim for name in TINY)
    # 50 images: BiT's small tasks, 500 updates; its code's falls at 200, 300 and 400 and its SGD without Nesterov and decay.
    for run in found.values():
        assert run.duration.value == 500
    assert (resnet.name, resnet.learning_rate, resnet.momentum, resnet.weight_decay) == ("momentum", 0.003, 0.9, 0)
    assert resnet.decay_steps == (200, 300, 400) and not resnet.uses_agc
    assert (nfnet.name, nfnet.clipping, nfnet.uses_agc) == ("sgd", 0.01, True)
    # He et al. 2022, table 9, at batch 50: 1e-3 * 50 / 256.
    assert (vit.name, vit.momentum, vit.second_momentum, vit.weight_decay) == ("adamw", 0.9, 0.999, 0.05)
    assert vit.learning_rate == pytest.approx(1e-3 * 50 / 256) and vit.layer_decay == 0.75 and not vit.uses_agc
    assert (found["timm:test_vit"].augment.mixup_alpha, found["timm:test_vit"].augment.cutmix_alpha) == (0.8, 1.0)
    assert (convnext.layer_decay, convnext.weight_decay) == (0.8, 1e-8)
    assert convnext.learning_rate == pytest.approx(5e-5 * 50 / 512)
    assert found["timm:test_convnext"].model.options["stochastic_depth"] == 0.2


def test_frozen_statistics_reach_only_networks_that_have_them(digits: str, tmp_path: Path) -> None:
    sweep = made(digits, tmp_path, (source("test_resnet", tmp_path), source("test_vit", tmp_path)), batch_norm="frozen")
    found = runs(sweep)
    assert {name: run.model.batch_norm for name, run in found.items()} == {
        "timm:test_resnet": "frozen",
        "timm:test_vit": "local",
    }
    first, second = recipes_told(sweep.sources, sweep.suite.methods)
    assert "family resnet: SGD with plain momentum" in first and "statistics of batch normalisation frozen" in first
    assert "family vit: AdamW" in second and "0.75" in second and "so frozen changes nothing" in second


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_timms_networks_finish_a_trial_and_its_entry_names_what_ran(name: str, digits: str, tmp_path: Path) -> None:
    own = source(name, tmp_path)
    own = dataclasses.replace(own, augment=dataclasses.replace(own.augment, image_px=160, eval_px=0))
    sweep = made(digits, tmp_path, (own,), num_steps=2, batch=8, rate_factors=[0.3, 1])
    cell = next(c for c in plan(sweep)[0] if c.init == "pretrained")
    assert len(cell.search) == 2
    found = run_finetune(sweep, cell.search[0], lambda row: None)
    assert found is not None and found.status == "ok" and found.images_seen == 16 and found.history[-1]["step"] == 2
    family = TINY[name]
    assert found.config["optim"]["name"] == ("adamw" if family in ADAMW else "momentum")
    assert found.config["optim"]["layer_decay"] == (ADAMW[family].layer_decay if family in ADAMW else 1.0)  # type: ignore[index]


def test_another_number_in_a_recipe_is_another_protocol(
    monkeypatch: pytest.MonkeyPatch, digits: str, tmp_path: Path
) -> None:
    sweep = made(digits, tmp_path, (source("test_resnet", tmp_path),))
    before = plan(sweep)[0][0].any_trial.protocol_digest
    monkeypatch.setitem(ADAMW, "vit", dataclasses.replace(ADAMW["vit"], layer_decay=0.65))
    assert plan(sweep)[0][0].any_trial.protocol_digest != before


def test_an_unknown_network_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="no model"):
        kind_of("timm:resnt50", {})
