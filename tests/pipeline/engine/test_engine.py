"""The engine computes what one plain process computes, at any sharding."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

import pipeline.engine.sam_step as sam_step
from nfnet.optim.agc import adaptive_clip_grad_
from nfnet.optim.losses import label_smoothing_cross_entropy
from nfnet.optim.param_groups import param_groups
from pipeline.checkpoint.load import Piece
from pipeline.data.augment.transforms import normalise
from pipeline.distributed import join
from pipeline.engine.deepspeed_engine import EngineConfig, deepspeed_config
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.update_stats import part_names
from pipeline.errors import UserError
from tests.pipeline import processes
from tests.pipeline.programs import engine_steps as program


def plain(clipping: float = 0.01, skip: int | None = None, sam_parts: int = 0) -> dict[str, torch.Tensor]:
    """The same steps in plain PyTorch: torch's SGD, AGC on .grad, an average by hand.

    sam_parts: SAM, each of so many equal parts of the batch moving the weights along its own gradient.
    """
    model = program.network()
    groups = param_groups(model, lr=0.1, weight_decay=1e-3, head_lr_scale=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    t = 0
    for step in range(program.STEPS):
        if step == skip:
            continue
        images, labels = program.batch(step)
        optimizer.zero_grad()
        if sam_parts:
            sharp_gradient(model, images, labels, sam_parts)
        else:
            label_smoothing_cross_entropy(model(images), labels).backward()
        if clipping:
            adaptive_clip_grad_(model.named_parameters(), clipping=clipping)
        optimizer.step()
        keep = min(0.9, (1 + t) / (10 + t))
        for n, p in model.named_parameters():
            average[n].mul_(keep).add_((1 - keep) * p.detach())
        t += 1
    momenta = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {
        f"{kind}/{n}": v
        for kind, values in (("weights", weights), ("momentum", momenta), ("ema", average))
        for n, v in values.items()
    }


def sharp_gradient(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, parts: int) -> None:
    """Facts of the paper, written out: e = rho g / |g| for each part by itself, gradients at w + e averaged."""
    weights = list(model.parameters())
    sums = [torch.zeros_like(w) for w in weights]
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        ascent = torch.autograd.grad(label_smoothing_cross_entropy(model(x), y), weights)
        norm = torch.cat([g.flatten() for g in ascent]).norm()
        kept = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, g in zip(weights, ascent, strict=True):
                w += 0.05 * g / norm
        second = torch.autograd.grad(label_smoothing_cross_entropy(model(x), y), weights)
        with torch.no_grad():
            for w, k, s, g in zip(weights, kept, sums, second, strict=True):
                w.copy_(k)
                s += g / parts
    for w, s in zip(weights, sums, strict=True):
        w.grad = s


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return plain()


def distance(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: str) -> float:
    return max(float((state[k] - v).abs().max()) for k, v in expected.items() if k.startswith(kind))


STAGES = (0, 1, 2, 3)
CASES: dict[str, dict[str, Any]] = {
    f"{stage}-{accumulation}": {"stage": stage, "accumulation": accumulation}
    for stage in STAGES
    for accumulation in (1, 2)
}
CASES["2-2"]["restore"] = CASES["3-2"]["restore"] = STAGES
CASES |= {f"sam-{stage}": {"stage": stage, "accumulation": 2, "sam_rho": 0.05} for stage in STAGES}
CASES_OF_SEVERAL = CASES | {
    **{f"poison-{stage}": {"stage": stage, "accumulation": 2, "poison_step": 4} for stage in STAGES},
    "sam-poison-3": {"stage": 3, "accumulation": 2, "sam_rho": 0.05, "poison_step": 4},
    **{f"bf16-{stage}": {"stage": stage, "accumulation": 1, "precision": "bf16"} for stage in STAGES},
    **{f"checkpointing-{s}": {"stage": s, "accumulation": 1, "activation_checkpointing": True} for s in STAGES},
}
SEVERAL = [2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """Number of ranks -> all cases' outcomes, computed once by one group of processes."""

    @lru_cache
    def compute(ranks: int) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("engine") / "out.pt"
        cases = CASES if ranks == 1 else CASES_OF_SEVERAL
        processes.run("engine_steps.py", out, cases, num_processes=ranks, timeout_s=1200)
        found: dict[str, Any] = torch.load(out)
        return found

    return compute


@pytest.fixture(params=[1, *SEVERAL], ids=lambda r: f"{r} ranks")
def group(request: pytest.FixtureRequest, outcomes: Callable[[int], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    return request.param, outcomes(request.param)


@pytest.fixture(params=SEVERAL, ids=lambda r: f"{r} ranks")
def several(request: pytest.FixtureRequest, outcomes: Callable[[int], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    return request.param, outcomes(request.param)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_equal_one_plain_process(
    stage: int, accumulation: int, group: tuple[int, dict[str, Any]], expected: dict[str, torch.Tensor]
) -> None:
    found = group[1][f"{stage}-{accumulation}"]
    assert distance(found["state"], expected, "weights") < 1e-6
    assert distance(found["state"], expected, "ema") < 1e-6
    assert distance(found["state"], expected, "momentum") < 1e-5
    assert all(0 < s["clipped_share"] < 1 for s in found["stats"])


@pytest.mark.parametrize("stage", STAGES[1:])
def test_no_rank_holds_more_than_its_share(stage: int, group: tuple[int, dict[str, Any]]) -> None:
    ranks, found = group
    state = found[f"{stage}-1"]["state"]
    padding = len(state) * ranks if stage == 3 else 3 * 4 * 2 * ranks  # of each parameter, of each flat group
    assert found[f"{stage}-1"]["held"] <= sum(v.numel() for v in state.values()) / ranks + padding


def test_clipping_changes_the_outcome(expected: dict[str, torch.Tensor]) -> None:
    """Or the equality above would prove nothing about AGC."""
    assert distance(plain(clipping=0.0), expected, "weights") > 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_is_not_finite_on_one_rank_is_left_out_on_all(
    stage: int, several: tuple[int, dict[str, Any]]
) -> None:
    found = several[1][f"poison-{stage}"]
    assert [s["applied"] for s in found["stats"]] == [s != 4 for s in range(program.STEPS)]
    assert distance(found["state"], plain(skip=4), "weights") < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_each_micro_batch_moves_the_weights_by_its_own_sharpness(
    stage: int, group: tuple[int, dict[str, Any]], expected: dict[str, torch.Tensor]
) -> None:
    ranks, found = group
    plain_state = plain(sam_parts=2 * ranks)
    assert distance(found[f"sam-{stage}"]["state"], plain_state, "weights") < 2e-6
    assert distance(plain_state, expected, "weights") > 1e-3


def test_an_ascent_that_is_not_finite_on_one_rank_leaves_stage_3_where_it_was(
    several: tuple[int, dict[str, Any]],
) -> None:
    """The weights that one rank alone gathered and moved are gone afterwards."""
    found = several[1]["sam-poison-3"]
    assert [s["applied"] for s in found["stats"]] == [s != 4 for s in range(program.STEPS)]
    assert distance(found["state"], plain(skip=4, sam_parts=2 * several[0]), "weights") < 2e-6


@pytest.mark.parametrize("stage", STAGES)
def test_recomputing_blocks_changes_nothing(stage: int, several: tuple[int, dict[str, Any]]) -> None:
    found = several[1]
    assert distance(found[f"checkpointing-{stage}"]["state"], found[f"{stage}-1"]["state"], "weights") < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_fp32_weights_and_stays_near(
    stage: int, several: tuple[int, dict[str, Any]], expected: dict[str, torch.Tensor]
) -> None:
    state = several[1][f"bf16-{stage}"]["state"]
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert 1e-6 < distance(state, expected, "weights") < 3e-2
    # All stages compute the same bf16 network; only sums over ranks may be taken in another order.
    assert distance(state, several[1]["bf16-0"]["state"], "weights") < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_are_added_up_over_ranks_in_fp32(stage: int, several: tuple[int, dict[str, Any]]) -> None:
    reduced = set(several[1][f"bf16-{stage}"]["reduced"])
    assert "torch.float32" in reduced and reduced <= {
        "torch.float32",
        "torch.float64",
    }  # nothing narrower


@pytest.mark.parametrize("stage", STAGES)
def test_an_evaluation_sees_the_averaged_weights(stage: int, group: tuple[int, dict[str, Any]]) -> None:
    found = group[1][f"{stage}-1"]
    model = program.network().eval()
    model.load_state_dict(found["half"])
    assert found["kind"] == "ema"
    torch.testing.assert_close(found["logits"], model(program.batch(0)[0]).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_with_fewer_images_wait_for_nobody(stage: int, group: tuple[int, dict[str, Any]]) -> None:
    """Three images on two ranks or four: in stage 3 a pass that one rank leaves out would be a hang."""
    found = group[1][f"{stage}-1"]
    model = program.network().eval()
    model.load_state_dict(found["half"])
    batches = list(program.ThreeImages().batches(1))
    images = torch.cat([normalise(b.images, program.AugmentConfig(), torch.device("cpu")) for b in batches])
    loss = torch.nn.functional.cross_entropy(model(images), torch.arange(3))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("restored", STAGES)
@pytest.mark.parametrize("saved", (2, 3))
def test_state_saved_at_one_stage_goes_on_at_another(
    saved: int, restored: int, group: tuple[int, dict[str, Any]]
) -> None:
    found = group[1][f"{saved}-2"]
    again = found["restored"][restored]
    assert all(torch.equal(again["state"][k], v) for k, v in found["state"].items())
    assert distance(again["next"], found["restored"][0]["next"], "weights") < 1e-6
    assert distance(again["next"], found["state"], "weights") > 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_each_part_of_the_network_is_measured(stage: int, group: tuple[int, dict[str, Any]]) -> None:
    """Against the weights themselves, one step of a plain process."""
    stats = group[1][f"{stage}-1"]["stats"]
    assert list(stats[1]["parts"]) == ["stem", "stage 0", "stage 1", "final", "head"]
    assert all(p["update_ratio"] is None for p in stats[0]["parts"].values())
    before, after, gradients = two_plain_steps()
    for name, part in stats[1]["parts"].items():
        members = [n for n, p in part_names(program.network(), before).items() if p == name]
        assert members
        norm = torch.cat([before[n].flatten() for n in members]).norm()
        moved = torch.cat([(after[n] - before[n]).flatten() for n in members]).norm()
        gradient = torch.cat([gradients[n].flatten() for n in members]).norm()
        assert part["weight_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert part["gradient_norm"] == pytest.approx(gradient.item(), rel=1e-4)
        assert part["update_ratio"] == pytest.approx((moved / norm).item(), rel=1e-3)


def two_plain_steps() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after the second step, and its clipped gradients."""
    model = program.network()
    groups = param_groups(model, lr=0.1, weight_decay=1e-3, head_lr_scale=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        images, labels = program.batch(step)
        label_smoothing_cross_entropy(model(images), labels).backward()
        adaptive_clip_grad_(model.named_parameters())
        optimizer.step()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return before, {n: p.detach() for n, p in model.named_parameters()}, gradients


def test_a_library_that_releases_weights_under_sam_is_refused() -> None:
    engine = alone(program.network(), OptimConfig(learning_rate=0.1, sam_rho=0.05), EngineConfig(zero_stage=3))
    weight: Any = engine.network.get_parameter("stem.0.weight")

    def gather_again(*_: Any) -> None:
        weight.data = weight.data.clone()

    engine.network.get_submodule("stem.0").register_forward_hook(gather_again)
    with pytest.raises(UserError, match=r"released stem\.0\.weight while that was in use"):
        engine.forward_backward(torch.randn(4, 3, 32, 32), torch.arange(4), is_last=True)
    engine.close()


def test_offloading_is_refused() -> None:
    with pytest.raises(UserError, match="cpu_offload is not supported"):
        EngineConfig(cpu_offload=True)


def alone(
    model: torch.nn.Module,
    optim: OptimConfig = OptimConfig(learning_rate=0.1),  # noqa: B008 - frozen
    config: EngineConfig = EngineConfig(),  # noqa: B008
) -> Engine:
    return Engine(
        model,
        optim=optim,
        config=config,
        world=join(),
        micro_batch=4,
        accumulation=1,
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_frozen_parameters_stay_and_are_saved_and_restored(stage: Any) -> None:
    fields, config = OptimConfig(learning_rate=0.1, ema_decay=0.9, frozen=("stem",)), EngineConfig(zero_stage=stage)
    engine, images, labels = alone(program.network(), fields, config), torch.randn(4, 3, 32, 32), torch.arange(4)
    before = {n: p.detach().clone() for n, p in engine.network.named_parameters()}
    engine.forward_backward(images, labels, is_last=True)
    engine.update(0.1)
    saved = {key: t.clone() for key, t in engine.local_fragments().items()}
    sums = engine.state_sums()
    frozen = [n for n in before if n.startswith("stem")]
    assert frozen and engine.shapes.keys() == before.keys()
    assert all(torch.equal(saved[f"{k}/{n}@0"], before[n].view(-1)) for k in ("weights", "ema") for n in frozen)
    assert not any(f"momentum/{n}@0" in saved for n in frozen)
    engine.close()

    other = program.network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    engine = alone(other, fields, config)

    def fill(pieces: list[Piece]) -> None:
        for piece in pieces:
            piece.values.copy_(saved[f"{piece.kind}/{piece.name}@{piece.start}"])

    engine.restore(("weights", "momentum", "ema"), fill, 1)
    assert engine.state_sums() == sums
    with engine.evaluation_network() as (_, weights):
        stem = dict(engine.network.named_parameters())
        assert weights == "ema" and all(torch.equal(stem[n], before[n]) for n in frozen)
    engine.close()


def test_an_ascent_that_is_not_finite_leaves_the_step_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sam_step.sam_backward
    monkeypatch.setattr(
        sam_step, "sam_backward", lambda *a, **k: real(*a, **k)._replace(ascent_norm=torch.tensor(torch.inf))
    )
    engine = alone(program.network(), OptimConfig(learning_rate=0.1, sam_rho=0.05), EngineConfig())
    before = {n: p.detach().clone() for n, p in engine.network.named_parameters()}
    engine.forward_backward(torch.randn(4, 3, 32, 32), torch.arange(4), is_last=True)
    assert not engine.update(0.1).applied
    assert all(torch.equal(p, before[n]) for n, p in engine.network.named_parameters())
    engine.close()


def test_a_batch_learnt_by_heart_has_no_gradient_and_that_is_no_fault() -> None:
    model = program.network()
    with torch.no_grad():
        model.head.bias[3] = 1e4
    engine = alone(model)
    engine.forward_backward(torch.randn(4, 3, 32, 32), torch.full((4,), 3), is_last=True)
    stats = engine.update(0.1)
    assert stats.applied and stats.loss == 0.0 and stats.gradient_norm == 0.0
    engine.close()


def test_a_loss_whose_gradient_is_lost_stops_the_run() -> None:
    engine = alone(program.network())
    engine.forward_backward(torch.randn(4, 3, 32, 32), torch.full((4,), 3), is_last=True)
    for parameter in engine.network.parameters():
        parameter.grad.zero_()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="saw no gradient at all"):
        engine.update(0.1)
    engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_the_library_is_told_not_to_clip(stage: Any) -> None:
    config = deepspeed_config(EngineConfig(zero_stage=stage), global_batch=64, micro_batch=8, accumulation=4)
    assert config["gradient_clipping"] == 0.0
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (64, 8)
