"""What a run says of the parts of its network."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nfnet.optim.param_groups import Rule, Setting
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.fragments import Fragment, Units
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.update_stats import PartStats, Sums, over_updates, part_names
from pipeline.models.backbone import ModelConfig
from pipeline.records import Step
from pipeline.training.run import Run
from pipeline.training.train import train


def stats(clipped: float, norm: float, ratio: float | None) -> PartStats:
    return PartStats(clipped_share=clipped, gradient_norm=norm, weight_norm=2.0, update_ratio=ratio)


def test_a_report_has_the_mean_clipped_share_and_the_last_updates_norms() -> None:
    found = over_updates([{"stem": stats(0.5, 9.0, None)}, {"stem": stats(1.0, 3.0, 0.25)}])
    assert found == {"stem": {"clipped_share": 0.75, "gradient_norm": 3.0, "weight_norm": 2.0, "update_ratio": 0.25}}


def test_each_report_measures_its_last_update_part_by_part(digits: str, tmp_path: Path) -> None:
    run = Run(
        name="parts",
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(url=digits, num_workers=0),
        augment=AugmentConfig(image_px=16, area_min=0.5, flip=False),
        optim=OptimConfig(learning_rate=0.1),
        engine=EngineConfig(parity_check=False),
        global_batch=8,
        micro_batch=8,
        duration=Duration(5, "steps"),
        log_every_steps=2,
        save_final=False,
    )
    steps = [r for r in train(run, str(tmp_path / "run")) if isinstance(r, Step)]
    assert [s.step for s in steps] == [2, 4, 5]
    for step in steps:
        assert list(step.parts) == ["stem", *(f"stage {i}" for i in range(3)), "final", "head"]
        assert all(ratio is not None and 0 < ratio < 1 for p in step.parts.values() for ratio in [p["update_ratio"]])
        # The parts' norms are the legs of the whole's.
        squares = sum(p["gradient_norm"] ** 2 for p in step.parts.values())  # type: ignore[operator]
        assert squares**0.5 == pytest.approx(step.gradient_norm, rel=1e-5)


def test_parameters_belong_to_the_part_that_their_network_says() -> None:
    network = nn.Module()
    network.variant = SimpleNamespace(depths=(2, 1))  # type: ignore[assignment]
    names = ["stem.0.weight", "blocks.0.a", "trunk.blocks.1.a.gain", "blocks.2.a", "final_conv.weight", "head.bias"]
    parts = ["stem", "stage 0", "stage 0", "stage 1", "final", "head"]
    assert part_names(network, names) == dict(zip(names, parts, strict=True))
    assert part_names(nn.Module(), ["blocks.0.a", "trunk.fc.bias"]) == {"blocks.0.a": "blocks", "trunk.fc.bias": "fc"}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_norms_of_the_coming_update_are_those_of_the_update_itself(momentum: float) -> None:
    """Against u = (1 + m)(c g + decay w) + m^2 v, written out for each unit."""
    w, g, v = torch.randn(3, 4, 50, dtype=torch.float64)
    factors = torch.tensor([1.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    decay, share = torch.tensor([0.1, 0.0, 0.2, 0.3]), torch.tensor([1.0, 2.0, 1.0, 0.5])
    sums = Sums(
        names=["stem", "head"],
        part=torch.tensor([0, 0, 1, 1]),
        clip=torch.tensor([True, True, True, False]),
        tensor=torch.tensor([0, 0, 1, 1]),
        decay=decay,
        rate=share,
        momentum=momentum,
    )
    units = torch.stack([(a * b).sum(1) for a, b in ((w, w), (g, g), (g, w), (g, v), (w, v), (v, v))]).float()
    rows = sums.of_parts(units, factors.float(), rate=0.3)
    clipped = factors[:, None] * g
    update = (1 + momentum) * (clipped + decay[:, None] * w) + momentum**2 * v
    moved = (0.3 * share[:, None] * update).square().sum(1)
    squares = [clipped.square().sum(1), w.square().sum(1), moved]
    expected = [[1, 1], [2, 1], *([s[:2].sum().item(), s[2:].sum().item()] for s in squares)]
    torch.testing.assert_close(rows, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.of_parts(units[:2], factors.float(), rate=0.3)[:4], rows[:4])
    assert not sums.of_parts(units[:2], factors.float(), rate=0.3)[4].any()
    whole, parts = sums.read(rows.flatten().tolist(), measured=True)
    assert whole.clipped_share == pytest.approx(2 / 3) and (
        parts["stem"].clipped_share,
        parts["head"].clipped_share,
    ) == (0.5, 1)
    assert whole.gradient_norm == pytest.approx(squares[0].sum().sqrt().item())
    assert parts["head"].weight_norm == pytest.approx(squares[1][2:].sum().sqrt().item())
    assert parts["stem"].update_ratio == pytest.approx((moved[:2].sum() / squares[1][:2].sum()).sqrt().item(), rel=1e-4)
    assert sums.read(rows.flatten().tolist(), measured=False)[0].update_ratio is None


def test_layer_by_layer_a_tensor_has_one_factor_and_its_gradient_ends_at_lambda_times_its_weights() -> None:
    sizes, clipping = [4, 1, 3], 0.02
    tensor = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    w = torch.rand(8, 5) + 0.5
    g = torch.randn(8, 5) * torch.tensor([9.0, 9.0, 1e-4])[tensor][:, None]
    clip = tensor != 1  # as the classifier's weight
    sums = Sums(names=["a"], part=torch.zeros(8).long(), clip=clip, tensor=tensor, decay=torch.zeros(8), rate=torch.ones(8),
                momentum=0.0)  # fmt: skip
    units = torch.stack([w.square().sum(1), g.square().sum(1)])
    factors = sums.factors(units, OptimConfig(learning_rate=1.0, clip="agc_layer", clipping=clipping))
    assert all(len(set(f.tolist())) == 1 for f in factors.split(sizes))
    assert (g[:4] * factors[:4, None]).norm().item() == pytest.approx(clipping * w[:4].norm().item(), rel=1e-5)
    assert (factors[4:] == 1).all()
    one_by_one = sums.factors(units, OptimConfig(learning_rate=1.0, clipping=clipping))
    torch.testing.assert_close((g * one_by_one[:, None]).norm(dim=1)[:4], clipping * w.norm(dim=1)[:4])
    norm = sums.factors(units, OptimConfig(learning_rate=1.0, clip="norm", clip_norm=0.5))
    assert (g * norm[:, None]).norm().item() == pytest.approx(0.5, rel=1e-4)
    loose = OptimConfig(learning_rate=1.0, clip="norm", clip_norm=1.5 * g.norm().item())
    assert (sums.factors(units, loose) == 1).all()  # a smaller gradient stays as it is


def test_a_part_without_clipped_units_or_weights_is_no_division_by_nothing() -> None:
    whole_numbers, zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    sums = Sums(
        names=["a"], part=whole_numbers, clip=zero > 0, tensor=whole_numbers, decay=zero, rate=zero + 1, momentum=0.9
    )
    whole, parts = sums.read(
        sums.of_parts(torch.zeros(6, 1), torch.ones(1), rate=0.1).flatten().tolist(), measured=True
    )
    assert whole == parts["a"] == PartStats(clipped_share=0.0, gradient_norm=0.0, weight_norm=0.0, update_ratio=0.0)


def test_what_a_unit_is_held_to_follows_from_its_parameters_rule() -> None:
    network = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 1), "head": nn.Linear(4, 2)})
    kinds = {"conv.weight": (True, True, False), "conv.bias": (False, True, False), "head.weight": (True, False, True)}
    rules = {
        n: Setting(Rule(n, decay, clip, is_head, lambda *_: True), 3.0 if is_head else 1.0, decay, clip)
        for n, (decay, clip, is_head) in kinds.items()
    }
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if name in rules}
    pieces = [Fragment(n, s, 0, torch.zeros(math.prod(s)), rules[n].clip) for n, s in shapes.items()]
    optim = OptimConfig(learning_rate=0.1, weight_decay=0.5, momentum=0.8)
    sums = Sums.of_network(network, rules, Units(shapes, pieces, torch.device("cpu")), optim)
    assert sums.names == ["conv", "head"] and sums.momentum == 0.8
    assert sums.part.tolist() == [0, 0, 0, 0, 1, 1] and sums.clip.tolist() == [True] * 4 + [False] * 2
    for clip, is_held in (("norm", True), ("none", False)):
        of_all = replace(optim, clip=clip)
        assert (
            Sums.of_network(network, rules, Units(shapes, pieces, torch.device("cpu")), of_all).clip.tolist()
            == [is_held] * 6
        )
    assert sums.decay.tolist() == [0.5] * 3 + [0.0] + [0.5] * 2 and sums.rate.tolist() == [1.0] * 4 + [3.0] * 2
