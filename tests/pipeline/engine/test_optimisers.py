"""Optimisers, losses, clipping and groups by configuration, against torch, timm and their training loops."""

import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nfnet
from nfnet.optim.losses import MixedLabels, binary_cross_entropy
from nfnet.optim.schedule import warmup_stable_decay
from pipeline.engine import optimisers
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models import timm_models
from tests.pipeline import processes
from tests.pipeline.programs import peer_steps as program


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return nfnet.create_model("nfnet_tiny", num_classes=10)


def optim(**fields: Any) -> OptimConfig:
    return OptimConfig(**{"learning_rate": 0.1, **fields})


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    out = tmp_path_factory.mktemp("peers") / "losses.pt"
    processes.run("peer_steps.py", out, timeout_s=3000)
    found: dict[str, dict[str, list[float]]] = torch.load(out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", program.NETWORKS)
def test_losses_are_those_of_timms_own_loop_at_every_stage(
    name: str, losses: dict[str, dict[str, list[float]]]
) -> None:
    plain = losses[name].pop("plain")
    assert losses[name].keys() >= {"stage 0"} and plain[-1] < plain[0]
    for stage, ours in losses[name].items():
        assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 1e-4, stage


@pytest.mark.slow
@pytest.mark.parametrize("name", program.FULL)
def test_two_hundred_losses_of_full_networks_are_those_of_timms_own_loop(name: str, tmp_path: Path) -> None:
    """And the loss of the averaged weights after them.

    Statistics of 32 numbers a channel make ResNet-50 chaotic: where its loss falls, one weight that is off by one unit in its
    last place moves the losses of timm's own loop by 3e-3. Ours may differ by as much from then on.
    """
    processes.run("peer_steps.py", tmp_path / "losses.pt", name, timeout_s=3000)
    found = torch.load(tmp_path / "losses.pt")[name]
    plain = found["plain"]
    assert len(plain) == program.LONG.steps + 1 and plain[-2] < plain[0]
    off = {key: [abs(a - b) for a, b in zip(losses, plain, strict=True)] for key, losses in found.items()}
    assert max(off["stage 0"][:30]) < 1e-5
    assert max(off["stage 0"]) < max(1e-4, 2 * max(off.get("nudged", [0.0])))


@pytest.mark.slow
@pytest.mark.parametrize("name", program.FULL)
def test_losses_of_full_networks_on_two_ranks_are_the_same_at_every_stage(name: str, tmp_path: Path) -> None:
    processes.run("peer_steps.py", tmp_path / "losses.pt", name, "20", num_processes=2, timeout_s=3000)
    found = torch.load(tmp_path / "losses.pt")[name]
    expected = found.pop("stage 0")
    assert len(found) == 3 and len(expected) == 21
    for stage, ours in found.items():
        assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-4, stage


def test_rates_by_layer_are_timms() -> None:
    from timm.optim import param_groups_layer_decay

    network = timm_models.make("timm:test_vit", 10, {})
    whole, _ = timm_models.as_timm("timm:test_vit", network, {})
    names = {id(p): n for n, p in whole.named_parameters()}
    theirs = {
        names[id(p)]: (round(group["lr_scale"], 9), group["weight_decay"])
        for group in param_groups_layer_decay(whole, 0.1, whole.no_weight_decay(), layer_decay=0.5)
        for p in group["params"]
    }
    chosen = optimisers.settings(network, optim(layer_decay=0.5))
    ours = {n.removeprefix("trunk."): (round(s.scale, 9), 0.1 * s.decay) for n, s in chosen.items()}
    assert ours == theirs and len({scale for scale, _ in ours.values()}) > 3


def test_rates_fall_from_the_head_to_the_stem_of_our_networks(tiny: nn.Module) -> None:
    chosen = optimisers.settings(tiny, optim(layer_decay=0.5))
    numbers = optimisers.layer_numbers(tiny)
    last = max(numbers.values())
    assert chosen["head.weight"].scale == 1 and numbers["stem.0.weight"] == 0 and last == len(tiny.blocks) + 2  # type: ignore[arg-type]
    assert all(s.scale == 0.5 ** (last - numbers[n]) for n, s in chosen.items())


def test_parts_and_patterns_are_frozen_scaled_and_left_unclipped() -> None:
    network = nfnet.create_model("nfnet_tiny", num_classes=10)
    fields = optim(frozen=("stem",), unclipped=("stage 1",), rate_scales=("head=10", "*.bias=0.5"))
    optimisers.freeze(network, fields)
    chosen = optimisers.settings(network, fields)
    assert not any(n.startswith("stem") for n in chosen) and not network.stem[0].weight.requires_grad  # type: ignore[union-attr]
    assert chosen["head.weight"].scale == 10 and chosen["head.bias"].scale == 5
    assert all(s.scale == 0.5 for n, s in chosen.items() if fnmatch.fnmatch(n, "blocks.*.bias"))
    clipped = {n.split(".")[1] for n, s in chosen.items() if n.startswith("blocks") and s.clip}
    free = {n.split(".")[1] for n, s in chosen.items() if n.startswith("blocks") and not s.clip}
    assert clipped and free and not clipped & free
    groups = optimisers.make(network, chosen, fields).param_groups
    assert sum(len(g["params"]) for g in groups) == len(chosen)


def test_the_classifier_is_clipped_on_demand(tiny: nn.Module) -> None:
    usual, whole = optimisers.settings(tiny, optim()), optimisers.settings(tiny, optim(clip_head=True))
    assert {n for n in usual if usual[n] != whole[n]} == {"head.weight"}
    assert whole["head.weight"].clip and not usual["head.weight"].clip


@pytest.mark.parametrize(("field", "end"), [("frozen", ""), ("unclipped", ""), ("rate_scales", "=0.5")])
def test_a_pattern_that_fits_nothing_is_refused_with_the_parts(tiny: nn.Module, field: str, end: str) -> None:
    fields = optim(**{field: (f"stage 9{end}",)})
    with pytest.raises(UserError, match=f"optim.{field} has 'stage 9'.*stage 0"):
        optimisers.freeze(tiny, fields)
        optimisers.settings(tiny, fields)


@pytest.mark.parametrize("fields", [{"name": "lamb"}, {"name": "muon"}])
def test_what_needs_whole_parameters_is_refused_where_they_are_cut(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"set engine\.zero_stage to 0"):
        optim(**fields).check_engine(1)
    optim(**fields).check_engine(0)
    with pytest.raises(UserError, match=r"optim\.frozen"):
        optim(frozen=("stem",)).check_engine(3)


def test_agc_in_front_of_adam_is_advised_against() -> None:
    assert "optim.clip norm" in optim(name="adamw").advice
    assert (
        not optim(name="adamw", clip="norm").advice and not optim().advice and not optim(name="lion", clipping=0).advice
    )
    with pytest.raises(UserError, match=r"optim\.unclipped"):
        optim(clip="norm", unclipped=("stem",))
    with pytest.raises(UserError, match=r"optim\.clip_head"):
        optim(clipping=0, clip_head=True)


def test_of_several_labels_binary_cross_entropy_is_scikit_learns_log_loss_over_what_is_said() -> None:
    from sklearn.metrics import log_loss

    logits, targets = torch.randn(6, 4), torch.randint(-1, 2, (6, 4)).float()
    said = targets >= 0
    expected = log_loss(targets[said], torch.sigmoid(logits[said].double()), labels=[0, 1])
    assert binary_cross_entropy(logits, targets).item() == pytest.approx(expected, abs=1e-6)
    assert said.sum() not in (0, 24) and torch.isfinite(binary_cross_entropy(logits, torch.full((6, 4), -1.0)))


def test_binary_cross_entropy_is_timms_and_takes_mixed_labels() -> None:
    from timm.loss import BinaryCrossEntropy

    logits, labels = torch.randn(6, 7), torch.randint(7, (6,))
    torch.testing.assert_close(
        binary_cross_entropy(logits, labels, 0.1), BinaryCrossEntropy(smoothing=0.1)(logits, labels)
    )
    other, share = torch.randint(7, (6,)), torch.rand(6)
    targets = sum(w[:, None] * (0.9 * F.one_hot(k, 7) + 0.1 / 7) for w, k in ((share, labels), (1 - share, other)))
    mixed = binary_cross_entropy(logits, MixedLabels(labels, other, share), 0.1)
    torch.testing.assert_close(mixed, F.binary_cross_entropy_with_logits(logits, targets))


def test_the_rate_is_stable_between_warm_up_and_cool_down() -> None:
    rates = [
        optim(schedule="stable", cooldown_share=0.3, final_learning_rate=0.01).rate(s, total_steps=10, warmup_steps=2)
        for s in range(11)
    ]
    assert rates == pytest.approx([0, 0.05, *[0.1] * 6, 0.07, 0.04, 0.01])
    with pytest.raises(ValueError, match="longer than the run"):
        warmup_stable_decay(0, total_steps=5, warmup_steps=3, cooldown_steps=3, peak=1.0)
