"""Before a run's first step its passes are compiled, compared with eager ones on noise, and kept or given up by all ranks alike.

Only passes are made here, no update and no collective: one rank may fail where another does not, and then all go on eagerly.
"""

import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

from nfnet.optim.losses import MixedLabels
from pipeline import distributed
from pipeline.compilation.passes import CompiledPasses, blocks_of
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import normalise
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.records import Notice, Phase, Record

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
"""Of loss, gradient and logits, as a share of their norm: what sums in another order differ by, and what bf16 then rounds
otherwise."""
MAX_REASON = 300
"""Characters of what a compiler says of its failure."""
EAGER = "eager"


class Noise(NamedTuple):
    """What a trial reads, in the shapes and the memory layout of a run's batches."""

    images: torch.Tensor
    labels: torch.Tensor | MixedLabels
    evaluated: torch.Tensor


@dataclass(frozen=True)
class Trial:
    """What passes gave."""

    loss: torch.Tensor
    gradient: list[torch.Tensor]
    logits: torch.Tensor


def _noise(engine: Engine, augment: AugmentConfig, num_classes: int, several_labels: bool) -> Noise:
    generator, device, micro_batch = torch.Generator().manual_seed(0), engine.world.device, engine.micro_batch

    def images(num: int, px: int) -> torch.Tensor:
        pixels = torch.randint(256, (num, px, px, 3), generator=generator, dtype=torch.uint8)
        return normalise(pixels, augment, device)

    classes = torch.randint(num_classes, (2, micro_batch), generator=generator).to(device)
    if several_labels:
        labels: torch.Tensor | MixedLabels = torch.nn.functional.one_hot(classes[0], num_classes).float()
    elif not augment.mixes:
        labels = classes[0]
    else:
        labels = MixedLabels(classes[0], classes[1], torch.full((micro_batch,), 0.75, device=device))
    return Noise(
        images(micro_batch, augment.image_px),
        labels,
        images(engine.evaluation_batch, augment.evaluation_px),
    )


def compiled(
    engine: Engine, config: EngineConfig, augment: AugmentConfig, num_classes: int, several_labels: bool = False
) -> Generator[Record, None, str]:
    """Compile as `config` says. Returns what serves from now on, in words; a compilation that is given up is a record too.

    Every rank calls this; records are equal on all but for times. No buffer and no random number changes.
    """
    if config.compile == "none":
        return EAGER
    if config.compile == "blocks":
        blocks_of(engine.network)
    yield Phase(step=0, name=f"compiling ({config.compile})")
    batch = _noise(engine, augment, num_classes, several_labels)
    expected = _trial(engine, config, batch)
    begin, before = time.perf_counter(), num_graphs()
    passes, differs, limit = (
        CompiledPasses(cuda_graphs=config.cuda_graphs),
        dict[str, float](),
        TOLERANCE[config.precision],
    )
    try:
        passes.install(
            engine.objective,
            engine.network,
            by=config.compile,
            gradients_add_up=engine.accumulation > 1,
            evaluation_batch=engine.evaluation_batch,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            differs = _differences(_trial(engine, config, batch), expected)
        # Not a number is refused too, where eager passes give numbers.
        wrong = [f"its {what} differs from eager's by {d:.1e}" for what, d in differs.items() if not d <= limit]
        problem = ", ".join(wrong)
    except Exception as error:  # a compiler fails in any way
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON]}"
    said = distributed.gather(engine.world, problem)
    failed = next((f"{text} (rank {rank})" for rank, text in enumerate(said) if text), "")
    if failed:
        passes.remove()
        yield Notice(
            step=0,
            text=f"engine.compile is {config.compile} and did not work here, so this run computes eagerly on all ranks: {failed}",
        )
        return f"{EAGER}, since compiling failed"
    recorded = ", recorded as CUDA graphs" if config.cuda_graphs else ""
    return (
        f"{config.compile}, {num_graphs() - before} graphs in {time.perf_counter() - begin:.0f} s{recorded}; within "
        f"{max(differs.values(), default=0):.0e} of eager passes"
    )


def num_graphs() -> int:
    """That this process has compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def _trial(engine: Engine, config: EngineConfig, batch: Noise) -> Trial:
    """The passes of a step and of an evaluation, as a run makes them."""
    objective, weights = engine.objective, [p for p in engine.network.parameters() if p.requires_grad]
    sizes, optim = [len(batch.images)], engine.optim
    if optim.sam_rho > 0:  # the ascent reads a part of the micro-batch
        sizes.insert(0, max(1, round(optim.sam_share * len(batch.images))))
    with engine.without_trace():
        objective.train()
        for size in sizes:
            torch.manual_seed(0)
            part = batch.labels
            part = MixedLabels(*(t[:size] for t in part)) if isinstance(part, MixedLabels) else part[:size]
            loss, _ = objective(batch.images[:size], part)
            # Not backward(): the engine's hooks on gradients would see them.
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        objective.eval()
        with (
            torch.no_grad(),
            torch.autocast(engine.world.device.type, torch.bfloat16, enabled=config.precision == "bf16"),
        ):
            logits = objective(batch.evaluated)
        objective.train()
    return Trial(loss.detach().clone(), [g.clone() for g in gradients if g is not None], logits.float())


def _differences(found: Trial, expected: Trial) -> dict[str, float]:
    """Of each result, as a share of its norm; of those that are not finite eagerly, nothing."""
    pairs = {
        "loss": ([found.loss], [expected.loss]),
        "gradient": (found.gradient, expected.gradient),
        "logits": ([found.logits], [expected.logits]),
    }
    shares = {}
    for what, (ours, theirs) in pairs.items():
        norm = _norm(theirs)
        distance = _norm([a.float() - b.float() for a, b in zip(ours, theirs, strict=True)])
        if torch.isfinite(norm):
            shares[what] = float(distance / norm.clamp(min=1e-3))
    return shares


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.float()) for t in tensors]))
