"""Every recipe resolves, has the sizes and the steps that its paper prints, and a smoke variant that trains."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import nfnet
from nfnet.analysis.flops import count_parameters
from nfnet.optim.sgd import SGD
from nfnet.variants import get_variant
from orchestration.cli import main
from pipeline import recipes
from pipeline.data.loading.data_config import DataConfig
from pipeline.duration import Duration
from pipeline.models.backbone import make
from pipeline.recipes.smoke_variants import SUFFIX
from pipeline.records import Finished, Step
from pipeline.training.run import Run, dump_yaml, load_yaml, override
from pipeline.training.train import train
from tests.pipeline.processes import ROOT

# name: (parameters in millions with a head of 1000 classes, steps), as printed or computed from what is: epochs * images /
# batch. 1,281,167 images are ImageNet's, 300M and 4B JFT's.
PRINTED = {
    "nfnet_f0_imagenet": (71.5, 112_603),
    "nfnet_f1_imagenet": (132.6, 112_603),
    "nfnet_f2_imagenet": (193.8, 112_603),
    "nfnet_f3_imagenet": (254.9, 112_603),
    "nfnet_f4_imagenet": (316.1, 112_603),
    "nfnet_f5_imagenet": (377.2, 112_603),
    "nfnet_f6_imagenet": (438.4, 112_603),
    "nfnet_f4_plus_300m": (527.0, 1_464_844),
    "nfnet_f4_300m": (316.1, 2_929_688),
    "nfnet_f7_plus_4b": (832.9, 7_812_500),
    "nfnet_f4_plus_imagenet_finetune": (527.0, 15_000),
    "nfnet_f4_plus_imagenet_finetune_plain": (527.0, 15_000),
    "nfnet_f7_plus_imagenet_finetune": (832.9, 31_278),  # 50 epochs of 2048
    # torchvision's ResNets and one gain more a block (tests/nfnet/analysis/test_tables.py); timm's nf_resnet50: 25.6M
    **{f"nf_resnet{n}_imagenet": (m, 112_603) for n, m in {50: 25.6, 101: 44.5, 152: 60.2, 200: 64.7}.items()},
    **{f"nf_resnet{n}_300m": (m, 2_929_688) for n, m in {50: 25.6, 101: 44.5, 152: 60.2, 200: 64.7}.items()},
    **{f"nf_resnet{n}_imagenet_finetune": (m, 15_000) for n, m in {50: 25.6, 101: 44.5, 152: 60.2, 200: 64.7}.items()},
    **{f"nf_regnet_b{n}_imagenet": (m, 450_410) for n, m in enumerate((8.6, 10.0, 13.8, 18.1, 29.3, 48.7))},
}


def num_steps(name: str, duration: Duration) -> int:
    """Updates of a recipe on the data that it is written for."""
    recipe, run = recipes.RECIPES[name], recipes.get(name)
    return duration.steps(samples_per_epoch=recipe.num_images * run.data.repeats, global_batch=run.global_batch)


def rates(name: str, *steps: int) -> list[float]:
    """At some of the run's steps; a negative one counts from its end."""
    run = recipes.get(name)
    total, warmup = num_steps(name, run.duration), num_steps(name, run.optim.warmup)
    return [run.optim.rate(s if s >= 0 else total + s, total_steps=total, warmup_steps=warmup) for s in steps]


def test_the_table_holds_every_recipe_of_a_paper_and_each_has_a_twin() -> None:
    assert set(PRINTED) == set(recipes.PAPERS)
    assert set(recipes.RECIPES) - set(PRINTED) - {f"{n}{SUFFIX}" for n in PRINTED} == {
        "nfnet_tiny_glyphs",
        "nfnet_tiny_cifar100",
    }


@pytest.mark.parametrize("name", PRINTED)
def test_a_recipe_resolves_to_the_printed_network_and_steps(name: str) -> None:
    run, (millions, steps) = recipes.get(name), PRINTED[name]
    with torch.device("meta"):
        model = make(run.model.name, 1000, run.model.options)
    assert round(count_parameters(model) / 1e6, 1) == millions
    assert num_steps(name, run.duration) == steps
    for ranks in (8, 16, 32):
        micro, accumulation = run.batch_plan(ranks)
        assert micro * accumulation * ranks == run.global_batch
        run.augment.check_micro_batch(micro)
    assert load_yaml(dump_yaml(run), name) == run and run.name == name


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_header_says_command_hardware_and_result_and_the_command_is_one(name: str) -> None:
    header = recipes.RECIPES[name].header
    assert all(f"\n{word}: " in header for word in ("Command", "Hardware", "Result")), header
    assert f"normfree pretrain {name} --data.url " in header
    assert [line for line in header.splitlines() if len(line) > 130] == []


def test_the_rates_are_the_papers_at_the_corners_of_their_schedules() -> None:
    # 5 epochs of warm-up at 4096 are 1,564 steps; 0.1 * 4096 / 256 = 1.6; half a cosine down to 0
    assert rates("nfnet_f0_imagenet", 0, 782, 1564) == pytest.approx([0, 0.8, 1.6])
    assert rates("nfnet_f0_imagenet", 1564 + (112_603 - 1564) // 2)[0] == pytest.approx(0.8, rel=1e-4)
    assert rates("nfnet_f6_imagenet", -1)[0] < 1e-8
    assert rates("nfnet_f4_plus_300m", 2500, 5000, -1) == pytest.approx([0.8, 1.6, 0], abs=1e-8)
    assert rates("nfnet_f7_plus_4b", 5000) == pytest.approx([0.4])
    assert rates("nfnet_f4_plus_imagenet_finetune", 0, 2500, 5000, 10_000, -1) == pytest.approx(
        [0, 0.05, 0.1, 0.05, 0], abs=1e-8
    )
    assert rates("nf_resnet50_300m", 5000, -1) == pytest.approx([0.4, 0], abs=1e-8)
    assert rates("nf_regnet_b0_imagenet", 6256, -1) == pytest.approx([0.4, 0.001], abs=1e-6)


def test_fine_tuning_is_regularised_as_the_paper_says_and_the_plain_one_is_not() -> None:
    run = recipes.get("nfnet_f4_plus_imagenet_finetune")
    assert run.model.options == {"drop_rate": 0.25, "stochastic_depth": 0.1}
    assert (run.global_batch, run.optim.weight_decay, run.optim.sam_rho, run.optim.ema_decay) == (
        2048,
        1e-5,
        0.05,
        0.9999,
    )
    for name in ("nfnet_f4_plus_imagenet_finetune_plain", "nf_resnet152_imagenet_finetune"):
        plain = recipes.get(name)
        assert (plain.model.options, plain.optim.weight_decay, plain.optim.sam_rho) == ({}, 0.0, 0.0)
        assert (plain.global_batch, plain.optim.learning_rate, plain.optim.ema_decay) == (2048, 0.1, 0.9999)
    repeated = recipes.get("nfnet_f7_plus_imagenet_finetune")
    assert (repeated.data.repeats, repeated.augment.image_px, repeated.augment.eval_px) == (4, 384, 480)


def test_sam_serves_f5_and_f6_alone_of_those_from_scratch() -> None:
    found = {n for n in PRINTED if n.endswith("_imagenet") and recipes.get(n).optim.sam_rho > 0}
    assert found == {"nfnet_f5_imagenet", "nfnet_f6_imagenet"}


@pytest.mark.parametrize("decay", [0.9999, 0.99999])
def test_in_15000_steps_the_averages_decay_is_its_warm_up_whatever_is_set(decay: float) -> None:
    """Why it does not matter that the paper does not say it for fine-tuned NFNets."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=0.0, ema_decay=decay)
    weight.grad = torch.zeros(1)
    optimizer.step()
    optimizer.param_groups[0]["num_updates"] = 14_999
    with torch.no_grad():
        weight.fill_(1.0)
    optimizer.step()
    assert float(optimizer.state[weight]["ema"]) == pytest.approx(1 - 15_000 / 15_009, rel=1e-3)


def test_regnets_decay_grows_with_their_size() -> None:
    found = [recipes.get(f"nf_regnet_b{n}_imagenet").optim.weight_decay for n in range(6)]
    assert found == [5e-5, 6e-5, 7e-5, 8e-5, 9e-5, 1e-4]


# --- smoke variants ---------------------------------------------------------------------------------------------------

KEPT = ("momentum", "weight_decay", "clipping", "ema_decay", "label_smoothing", "sam_rho", "sam_share")


@pytest.mark.parametrize("name", PRINTED)
def test_a_twin_keeps_the_shape_of_its_recipe(name: str) -> None:
    whole, tiny = recipes.get(name), recipes.get(f"{name}{SUFFIX}")
    assert all(getattr(whole.optim, k) == getattr(tiny.optim, k) for k in KEPT)
    assert (whole.engine, whole.model.options, whole.data.repeats) == (
        tiny.engine,
        tiny.model.options,
        tiny.data.repeats,
    )
    kinds = ("crop", "flip", "policy", "policy_layers", "mixup_alpha", "cutmix_alpha", "mix_order", "eval_resize")
    assert all(getattr(whole.augment, k) == getattr(tiny.augment, k) for k in kinds)
    assert get_variant(whole.model.name).family == get_variant(tiny.model.name).family
    assert tiny.batch_plan(1)[1] == 2 and tiny.batch_plan(2)[1] == 1
    assert tiny.model.init_from == (whole.model.init_from and f"{whole.model.init_from}{SUFFIX}")
    assert count_parameters(nfnet.create_model(tiny.model.name)) < 3e6


def test_a_twins_warm_up_keeps_its_share() -> None:
    assert recipes.get("nfnet_f4_plus_imagenet_finetune_tiny").optim.warmup == Duration(7, "steps")  # a third of 20
    assert recipes.get("nfnet_f4_plus_300m_tiny").optim.warmup == Duration(1, "steps")


def trained(name: str, digits: str, folder: Path, **changes: Any) -> list[Any]:
    """A smoke variant's first three steps; one that starts from another starts from three steps of that."""
    run = recipes.get(f"{name}{SUFFIX}")
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, url=digits, eval_split=None),
        engine=dataclasses.replace(run.engine, parity_check=False),
        optim=dataclasses.replace(run.optim, warmup=Duration(1, "steps")),
        duration=Duration(3, "steps"),
        log_every_steps=1,
        **changes,
    )
    if run.model.init_from and not changes:
        source = Path(run.model.init_from).name.removesuffix(SUFFIX)
        assert source in recipes.PAPERS
        trained(source, digits, folder)
        run = dataclasses.replace(
            run, model=dataclasses.replace(run.model, init_from=str(folder / f"{source}{SUFFIX}"))
        )
    return list(train(run, str(folder / run.name)))


def holds(name: str, digits: str, folder: Path) -> None:
    records = trained(name, digits, folder)
    steps = [r for r in records if isinstance(r, Step)]
    assert len(steps) == 3 and all(0 < r.loss < 10 and r.gradient_norm > 0 for r in steps)
    assert isinstance(records[-1], Finished) and records[-1].checkpoint


# One of each kind: SAM and the whole augmentation; fine-tuned with SAM from a pretrained one; repeats; each family.
QUICK = (
    "nfnet_f6_imagenet",
    "nfnet_f4_plus_imagenet_finetune",
    "nf_resnet50_imagenet_finetune",
    "nf_regnet_b2_imagenet",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_smoke_variant_of_each_kind_trains_and_saves(name: str, digits: str, tmp_path: Path) -> None:
    holds(name, digits, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PRINTED if n not in QUICK])
def test_every_smoke_variant_trains_and_saves(name: str, digits: str, tmp_path: Path) -> None:
    holds(name, digits, tmp_path)


def test_a_run_of_before_the_order_in_lanes_goes_on_with_the_fields_that_the_change_log_names() -> None:
    (words,) = re.findall(r"go on with `(--data[^`]+)`", (ROOT / "CHANGELOG.md").read_text())
    names = shlex.split(words)
    fields = dict(zip((n.removeprefix("--") for n in names[::2]), names[1::2], strict=True))
    data = override(recipes.get("nfnet_f4_plus_300m"), fields).data
    assert data == DataConfig(num_workers=8, mix_blocks=4096, cache_gb=0)


# --- the command ------------------------------------------------------------------------------------------------------


def test_what_the_command_shows_is_a_file_that_it_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in recipes.RECIPES:
        assert main(["pretrain", name, "--show"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("# ") and load_yaml(shown, name) == recipes.get(name)
    (tmp_path / "run.yaml").write_text(shown)
    assert main(["pretrain", str(tmp_path / "run.yaml"), "--show"]) == 0
    shown_again: Run = load_yaml(capsys.readouterr().out, "shown")
    assert shown_again == recipes.get(name)


def test_the_command_lists_each_recipe_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {*PRINTED, "nfnet_tiny_glyphs"} <= {line.split()[0] for line in lines}
    assert main(["pretrain"]) == 2 and "--list" in capsys.readouterr().err


def test_fine_tuning_without_its_source_says_so(digits: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no checkpoint at"):
        trained(
            "nfnet_f4_plus_imagenet_finetune",
            digits,
            tmp_path,
            model=dataclasses.replace(
                recipes.get("nfnet_f4_plus_imagenet_finetune_tiny").model, init_from=str(tmp_path / "none")
            ),
        )
