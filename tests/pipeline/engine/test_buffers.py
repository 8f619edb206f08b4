"""Running statistics and other buffers are state: equal at any sharding, skipped with a step, averaged, saved and restored."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

from nfnet.optim.agc import adaptive_clip_grad_
from nfnet.optim.losses import label_smoothing_cross_entropy
from nfnet.optim.param_groups import param_groups
from pipeline.engine.buffers import Buffers
from pipeline.errors import UserError
from pipeline.models.batch_norm import set_statistics
from tests.pipeline import processes
from tests.pipeline.programs import buffer_steps as program
from tests.pipeline.programs.engine_steps import STEPS, batch

CASES: dict[str, dict[str, Any]] = {
    **{f"{stage}": {"stage": stage, "accumulation": 2} for stage in (0, 1, 2, 3)},
    **{
        f"recomputed-{stage}": {"stage": stage, "accumulation": 2, "activation_checkpointing": True} for stage in (0, 3)
    },
    "poison-1": {"stage": 1, "accumulation": 2, "poison_step": 4},
    "frozen-0": {"stage": 0, "accumulation": 2, "statistics": "frozen"},
    "sam-0": {"stage": 0, "accumulation": 2, "sam_rho": 0.05},
    "synchronised-1": {"stage": 1, "accumulation": 1, "statistics": "synchronised"},
}
CASES["2"]["restore"] = [0, 3]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    @lru_cache
    def compute(ranks: int) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("buffers") / "out.pt"
        processes.run("buffer_steps.py", out, CASES, num_processes=ranks, timeout_s=1200)
        found: dict[str, Any] = torch.load(out)
        return found

    return compute


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest, outcomes: Callable[[int], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    return request.param, outcomes(request.param)


def plain(
    num_parts: int, *, ranks: int = 1, skip: int | None = None, statistics: Any = "local"
) -> dict[str, torch.Tensor]:
    """One process: equal parts of each batch one after the other; those of a rank follow each other's statistics, and the
    ranks' statistics are averaged."""
    model = program.network(statistics)
    optimizer = torch.optim.SGD(
        param_groups(model, lr=0.1, weight_decay=1e-3, head_lr_scale=0.5), lr=0.1, momentum=0.9, nesterov=True
    )
    average = {n: t.clone() for n, t in model.state_dict().items()}
    t = 0
    for step in range(STEPS):
        if step == skip:
            continue
        images, labels = batch(step)
        optimizer.zero_grad()
        before = {n: b.clone() for n, b in model.named_buffers()}
        after: list[dict[str, torch.Tensor]] = []
        micros = list(zip(images.chunk(num_parts), labels.chunk(num_parts), strict=True))
        for rank in range(ranks):
            model.load_state_dict(before, strict=False)
            for x, y in micros[rank::ranks]:
                (label_smoothing_cross_entropy(model(x), y) / num_parts).backward()
            after.append({n: b.clone() for n, b in model.named_buffers()})
        mean = {n: torch.stack([a[n].double() for a in after]).mean(0).to(b.dtype) for n, b in before.items()}
        model.load_state_dict(mean, strict=False)
        adaptive_clip_grad_(model.named_parameters())
        optimizer.step()
        keep = min(0.9, (1 + t) / (10 + t))
        for n, v in model.state_dict().items():
            if v.is_floating_point():
                average[n].lerp_(v, 1 - keep)
            else:
                average[n].copy_(v)
        t += 1
    return {f"{k}/{n}": v for k, s in (("weights", model.state_dict()), ("ema", average)) for n, v in s.items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[k].double() - v.double()).abs().max()) for k, v in expected.items())


@pytest.mark.parametrize("name", ["0", "1", "2", "3", "recomputed-0", "recomputed-3", "poison-1", "frozen-0"])
def test_buffers_equal_those_of_one_plain_process(name: str, group: tuple[int, dict[str, Any]]) -> None:
    ranks, found = group
    options = CASES[name]
    expected = plain(
        2 * ranks, ranks=ranks, skip=options.get("poison_step"), statistics=options.get("statistics", "local")
    )
    assert {k for k in expected if "running" in k and "ema/" in k} and "weights/table" in expected
    assert distance(found[name]["state"], expected) < 2e-6
    count = found[name]["state"]["weights/stem.1.num_batches_tracked"]
    assert count.dtype == torch.int64 and count == expected["weights/stem.1.num_batches_tracked"]


def test_synchronised_statistics_are_those_of_the_whole_batch(group: tuple[int, dict[str, Any]]) -> None:
    assert distance(group[1]["synchronised-1"]["state"], plain(1)) < 2e-6


def test_statistics_under_sam_count_each_image_once(group: tuple[int, dict[str, Any]]) -> None:
    state = group[1]["sam-0"]["state"]
    assert state["weights/stem.1.num_batches_tracked"] == 2 * STEPS
    plain_mean, sam_mean = (
        plain(2 * group[0], ranks=group[0])["weights/stem.1.running_mean"],
        state["weights/stem.1.running_mean"],
    )
    assert 0 < float((sam_mean - plain_mean).abs().max()) < 0.1  # of weights that moved otherwise


def test_what_was_saved_is_restored_at_another_stage(group: tuple[int, dict[str, Any]]) -> None:
    for stage, after in group[1]["2"]["restored"].items():
        for key, value in group[1]["2"]["state"].items():
            assert torch.equal(after["state"][key], value), (stage, key)
        assert after["next"]["weights/stem.1.num_batches_tracked"] == 2 * (STEPS + 1)


def test_a_table_that_nobody_writes_does_not_drift() -> None:
    """A mean of three equal numbers need not be that number."""
    network = nn.Module()
    network.register_buffer("table", torch.rand(100))
    buffers = Buffers(network, torch.device("cpu"), averages=False)
    before = buffers.copy()["table"]
    buffers.applied(torch.stack([buffers.moves()] * 3).sum(0) / 3, 0.5)
    assert torch.equal(buffers.now()["table"], before)


def test_tied_weights_are_refused_in_one_sentence() -> None:
    network = nn.Module()
    network.one, network.two = nn.Linear(3, 3), nn.Linear(3, 3)
    network.two.weight = network.one.weight
    with pytest.raises(UserError, match=r"two\.weight is the same tensor as one\.weight"):
        Buffers(network, torch.device("cpu"), averages=False)


def test_a_network_without_batch_normalisation_has_none_to_share() -> None:
    with pytest.raises(UserError, match=r"model\.batch_norm is frozen"):
        set_statistics(nn.Linear(2, 2), "frozen")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_rank_synchronised_is_torchs_own(momentum: float | None) -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.BatchNorm2d(5, momentum=momentum))
    with torch.no_grad():
        own[0].weight.uniform_()
    shared = set_statistics(nn.Sequential(nn.BatchNorm2d(5, momentum=momentum)), "synchronised")
    shared.load_state_dict(own.state_dict())
    for _ in range(3):
        x = torch.randn(4, 5, 3, 3) * 3 + 7
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        one, other = own(a), shared(b)
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
        (one * x.cos()).sum().backward()
        (other * x.cos()).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=2e-6, rtol=1e-5)
    for name, tensor in own.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(x), shared.eval()(x), atol=2e-6, rtol=1e-5)
