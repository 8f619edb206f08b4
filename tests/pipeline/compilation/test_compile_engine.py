"""Compiled passes compute what eager ones do, in as many graphs as there are kinds of blocks, or are given up by all ranks."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nfnet
from nfnet.variants import Variant
from pipeline.compilation import compile_engine, passes
from pipeline.compilation.compile_engine import compiled, num_graphs
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.distributed import join, leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig, build_model
from pipeline.records import Changed, Notice, Record, Started, Step
from pipeline.training.check_run import check_network
from pipeline.training.train import train
from tests.pipeline import processes
from tests.pipeline.training.test_resume import small_run
from tests.pipeline.training.test_train import state

THREE = Variant(
    name="three", depths=(3,), widths=(16,), strides=(2,), stem_widths=(8,), stem_strides=(2,), group_width=8
)
"""A transition, and two blocks of one kind with different betas and rates."""
KINDS = 2
MICRO_BATCH, PX = 4, 16


def network() -> nfnet.NFNet:
    torch.manual_seed(0)
    made = nfnet.NFNet(THREE, 10, drop_rate=0.2, stochastic_depth=0.5)
    for name, parameter in made.named_parameters():
        if name.endswith("skip_gain"):  # at 0 no block would count
            torch.nn.init.constant_(parameter, 0.5)
    return made


def engine_of(config: EngineConfig, model: torch.nn.Module | None = None, **optim: Any) -> Engine:
    fields = OptimConfig(learning_rate=0.1, ema_decay=0.9, **optim)
    device = join()
    return Engine(
        model or network(), optim=fields, config=config, world=device, micro_batch=MICRO_BATCH, accumulation=2
    )


def compile_now(engine: Engine, config: EngineConfig) -> tuple[list[Record], str]:
    """Records, and the words for what serves."""
    passes_of, records = compiled(engine, config, AugmentConfig(image_px=PX), 10), []
    while True:
        try:
            records.append(next(passes_of))
        except StopIteration as end:
            return records, end.value


def images_of(num: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, 3, PX, PX, generator=generator).contiguous(memory_format=torch.channels_last)


def steps(engine: Engine, num: int = 3) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    """Losses, weights, and logits of five images on averaged weights, looked at in the middle."""
    me = engine.world
    losses, images = [], images_of(2 * MICRO_BATCH * me.size).chunk(me.size)[me.rank].to(me.device)
    for step in range(num):
        for micro, part in enumerate(images.split(MICRO_BATCH)):
            torch.manual_seed(step * 2 + micro)
            engine.forward_backward(part, torch.arange(MICRO_BATCH, device=part.device) + step, is_last=micro == 1)
        losses.append(engine.update(0.1).loss)
        with engine.evaluation_network() as (evaluated, _), torch.no_grad():
            logits = evaluated(images[:5])
    return losses, engine.gather("weights"), logits


def assert_equal_to_eager(config: EngineConfig, model: Any = network, atol: float = 1e-5, **optim: Any) -> str:
    """In losses, weights and logits of three steps. Returns the words."""
    eager = engine_of(dataclasses.replace(config, compile="none", cuda_graphs=False), model(), **optim)
    expected = steps(eager)
    eager.close()
    engine = engine_of(config, model(), **optim)
    names = list(engine.network.state_dict())
    records, words = compile_now(engine, config)
    assert not [r for r in records if isinstance(r, Notice)], records
    found, before = steps(engine), num_graphs()
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    assert list(engine.network.state_dict()) == names
    with engine.evaluation_network() as (evaluated, _), torch.no_grad():
        for num in (1, 3, engine.evaluation_batch + 6):
            assert len(evaluated(images_of(num).to(engine.world.device))) == num
    assert num_graphs() == before
    engine.close()
    return words


@pytest.fixture
def captured_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured and run as they are: no compiler has to be waited for."""
    torch._dynamo.reset()
    monkeypatch.setattr(passes, "BACKEND", "eager")


@pytest.mark.usefixtures("captured_only")
@pytest.mark.parametrize(("by", "graphs", "stage"), [("blocks", 2 * KINDS, 0), ("network", 2, 2)])
def test_a_graph_for_each_kind_and_numbers_as_before(by: Any, graphs: int, stage: Any) -> None:
    """Training and evaluation are two kinds of pass; another number of images is none."""
    words = assert_equal_to_eager(EngineConfig(compile=by, zero_stage=stage))
    assert words.startswith(f"{by}, {graphs} graphs in ")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["blocks", "network"])
@pytest.mark.parametrize(
    ("how", "stage"), [("plain", 0), ("plain", 2), ("checkpointing", 1), ("sam", 0), ("sam", 2), ("bf16", 1)]
)
def test_the_derivative_s_graph_too(by: Any, how: str, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(passes, "BACKEND", "aot_eager")
    config = EngineConfig(
        compile=by,
        zero_stage=stage,
        activation_checkpointing=how == "checkpointing",
        precision="bf16" if how == "bf16" else "fp32",
    )
    optim = {"sam_rho": 0.05, "sam_share": 0.5} if how == "sam" else {}
    if how == "bf16":
        # Evaluated under autocast by a run, and without it here: one more graph for each kind.
        monkeypatch.setattr("tests.pipeline.compilation.test_compile_engine.num_graphs", lambda: 0)
    assert_equal_to_eager(config, atol=2e-2 if how == "bf16" else 1e-5, **optim)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_inductor_drops_what_eager_passes_drop() -> None:
    torch._dynamo.reset()
    assert_equal_to_eager(EngineConfig(compile="network"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:test_vit"])
def test_a_network_of_timm_compiles_with_its_running_statistics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(passes, "BACKEND", "aot_eager")
    options = {"img_size": PX} if "vit" in name else {}

    def model() -> torch.nn.Module:
        return build_model(ModelConfig(name=name, options=options), 10, seed=0)[0]

    assert_equal_to_eager(EngineConfig(compile="network"), model, atol=1e-4, clip="none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here; the tests above are its twins")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["blocks", "network"])
def test_cuda_graphs_compute_the_same(by: Any) -> None:
    words = assert_equal_to_eager(EngineConfig(compile=by, cuda_graphs=True), atol=1e-4)
    assert "recorded as CUDA graphs" in words


# --- given up -----------------------------------------------------------------------------------------------------


def fails(graph: Any, inputs: Any) -> Any:
    raise OSError("there is no compiler")


def doubles(graph: Any, inputs: Any) -> Any:
    """A compiler that is wrong."""

    def run(*given: Any) -> Any:
        return tuple(t * 2 if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in graph(*given))

    return run


@pytest.mark.parametrize(("backend", "says"), [(fails, "there is no compiler"), (doubles, "differs from eager's by")])
def test_what_fails_or_computes_something_else_is_given_up_loudly(
    backend: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(passes, "BACKEND", backend)
    config = EngineConfig(compile="blocks")
    engine = engine_of(config)
    before = {id(m): set(vars(m)) for m in (engine.objective, *engine.network.modules())}
    records, words = compile_now(engine, config)
    (notice,) = (r for r in records if isinstance(r, Notice))
    assert says in notice.text and "computes eagerly on all ranks" in notice.text and words.startswith("eager")
    assert {id(m): set(vars(m)) for m in (engine.objective, *engine.network.modules())} == before
    assert all(isinstance(number, float) for b in network().blocks for number in (b.act0.factor, b.act0.before))
    assert all(isinstance(getattr(o, n), float) for b in engine.network.blocks for o, n in b.own_numbers)  # type: ignore
    engine.close()


@pytest.mark.usefixtures("captured_only")
def test_what_fails_on_one_rank_is_given_up_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(compile="network")
    engine = engine_of(config)
    # Nothing is wrong here; the other rank says otherwise.
    monkeypatch.setattr(
        compile_engine, "distributed", SimpleNamespace(gather=lambda world, mine: [mine, "OSError: no compiler"])
    )
    records, words = compile_now(engine, config)
    assert [r.text for r in records if isinstance(r, Notice)] and words.startswith("eager")
    assert "losses" not in vars(engine.objective)
    engine.close()


def test_a_run_says_what_it_runs_and_what_it_ran_before(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "BACKEND", fails)
    run = small_run(digits)
    records = list(train(run, str(tmp_path), leave_at=2))
    assert [r.passes for r in records if isinstance(r, Started)] == ["eager"]
    again = dataclasses.replace(run, engine=dataclasses.replace(run.engine, compile="blocks"))
    for changes in (["engine.compile"], []):  # it is compared with the start before
        records = list(train(again, str(tmp_path), leave_at=3))
        assert [r.what for r in records if isinstance(r, Changed)] == changes
        assert [r.passes for r in records if isinstance(r, Started)] == ["eager, since compiling failed"]
        assert any(isinstance(r, Notice) and "no compiler" in r.text for r in records)


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"compile": "network", "zero_stage": 3}, r"engine\.zero_stage to 2"),
        ({"cuda_graphs": True}, r"engine\.compile is none"),
        ({"cuda_graphs": True, "compile": "blocks", "activation_checkpointing": True}, "computed again"),
        ({"compile": "everything"}, "none, blocks, network"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        EngineConfig(**fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they would be recorded")
def test_cuda_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(UserError, match=r"set engine\.cuda_graphs to false"):
        engine_of(EngineConfig(compile="network", cuda_graphs=True))


def test_a_network_without_blocks_of_ours_is_refused_before_the_run(digits: str) -> None:
    pytest.importorskip("timm")
    run = small_run(digits)
    run = dataclasses.replace(
        run, model=ModelConfig(name="timm:resnet10t"), engine=dataclasses.replace(run.engine, compile="blocks")
    )
    with pytest.raises(UserError, match="set it to network"):
        check_network(run)


def test_statistics_over_ranks_are_refused(digits: str) -> None:
    run = small_run(digits)
    with pytest.raises(UserError, match=r"model\.batch_norm synchronised"):
        dataclasses.replace(
            run,
            model=ModelConfig(name="timm:resnet10t", batch_norm="synchronised"),
            engine=dataclasses.replace(run.engine, compile="network"),
        )


# --- beside other settings ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("captured_only")
def test_a_run_that_finds_its_micro_batch_itself_is_compiled_for_it(digits: str, tmp_path: Path) -> None:
    found = []
    for name, changes in {"auto": {"compile": "network"}, "eager": {}}.items():
        engine = EngineConfig(parity_check=False, **changes)  # type: ignore[arg-type]
        run = small_run(digits, micro_batch="auto" if name == "auto" else 16, engine=engine)
        records = list(train(run, str(tmp_path / name / "run")))
        leave()
        (started,) = (r for r in records if isinstance(r, Started))
        assert started.micro_batch == 16 and started.passes.startswith("network, 2 graphs" if changes else "eager")
        found.append(({r.step: r.loss for r in records if isinstance(r, Step)}, state(tmp_path / name)[0]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_compute_compiled_by_inductor_what_they_do_eagerly(stage: int) -> None:
    said = processes.run("compiled_steps.py", stage, num_processes=2, timeout_s=900)
    assert said.count("network, 2 graphs in ") == 2
