"""`micro_batch: auto`: the largest micro-batch that fits, found on each rank at the start of a run; all take the least.

    CPU, and ZeRO stage 3    what a step holds (`pipeline.fitting.memory`) against a share of what is free
    GPU, stages 0 to 2       tried: a forward and a backward pass with as much set aside as the rest of a step takes

No trial makes a collective: a rank that runs out of memory in one would leave the others waiting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nfnet.analysis.step_profile import StepProfile, step_profile
from pipeline import distributed
from pipeline.distributed import World
from pipeline.engine import optimisers
from pipeline.engine.deepspeed_engine import EngineConfig, Objective, recompute_blocks, set_arithmetic
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.fitting.host_memory import available_bytes
from pipeline.fitting.memory import Memory, memory
from pipeline.fitting.parameters import Parameters
from pipeline.models.backbone import ModelConfig, build_model, make
from pipeline.supervision.rank_environment import num_hosts

CPU_SHARE, GPU_SHARE = 0.8, 0.92
"""Of the memory that is free: the rest is for what a step's tensors are not (loaders, fragments between them, workspaces)."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The run whose micro-batch is to be found."""

    model: ModelConfig
    num_classes: int
    image_px: int
    optim: OptimConfig
    engine: EngineConfig
    global_batch: int
    candidates: Sequence[int]
    """Images, falling; each divides a rank's share."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    micro_batch: int
    text: str
    """How it was found, for people."""


def find(asked: Asked, world: World) -> Fit:
    """The same on all ranks. A collective.

    Raises:
        UserError: not even the smallest fits on some rank; with what would.
    """
    is_cpu = world.device.type == "cpu"
    free = available_bytes() // _on_this_host(world) if is_cpu else torch.cuda.mem_get_info(world.device)[0]
    part = CPU_SHARE if is_cpu else GPU_SHARE
    room = int(part * free)
    held = _Held(asked, world)
    try:
        held.bytes(asked.candidates[-1])
    except ValueError as error:
        raise UserError(f"{error}; set engine.activation_checkpointing to false") from None
    tries = not is_cpu and asked.engine.zero_stage < 3
    if tries:
        trial = _Trial(asked, world, held)
        found = largest(asked.candidates, trial.fits)
        trial.close()
    else:
        found = largest(asked.candidates, lambda micro: held.bytes(micro) <= room)
    micro, its_room = min(distributed.gather(world, (found, room)))
    if not micro:
        raise UserError(_nothing_fits(asked, held, its_room))
    how = "tried on this device"
    if not tries:
        how = f"by the plan's estimate, {held.bytes(micro) / 1e9:.3g} GB of {room / 1e9:.3g} "
        how += f"({part:.0%} of what is free, divided by the processes of a host)"
    text = (
        f"micro_batch auto: {micro} images, the largest of {', '.join(map(str, asked.candidates[:12]))} that fits on every "
        f"one of {world.size} processes, {how}"
    )
    return Fit(micro_batch=micro, text=text)


def largest(candidates: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The first that fits, which a device that runs out of memory does not; 0 if none."""
    for micro in candidates:
        try:
            if fits(micro):
                return micro
        except torch.OutOfMemoryError:
            continue
    return 0


def _on_this_host(world: World) -> int:
    return max(1, -(-world.size // num_hosts()))


class _Held:
    """What a step of the run holds, by its stage and whether blocks are computed again."""

    def __init__(self, asked: Asked, world: World) -> None:
        self._asked, self._world = asked, world
        with torch.device("meta"):
            self._network = make(asked.model.name, asked.num_classes, asked.model.options)
        self._parameters = Parameters.of(self._network)
        self._profiles: dict[tuple[float, int], StepProfile] = {}

    def memory(self, micro: int, engine: EngineConfig | None = None) -> Memory:
        """ValueError where the network cannot compute its blocks again."""
        engine = engine or self._asked.engine
        again, px, precision = engine.recomputed, self._asked.image_px, engine.precision
        if again not in self._profiles:
            share, every = again
            profile = step_profile(self._network, px, precision=precision, checkpointing=share, every=every)
            self._profiles[again] = profile
        return memory(
            self._parameters,
            self._profiles[again],
            stage=engine.zero_stage,
            world=self._world.size,
            micro_batch=micro,
            accumulation=self._asked.global_batch // self._world.size // micro,
            averages=self._asked.optim.ema_decay is not None,
            num_moments=len(self._asked.optim.moments),
            is_cpu=self._world.device.type == "cpu",
        )

    def bytes(self, micro: int, engine: EngineConfig | None = None) -> int:
        return self.memory(micro, engine).total

    def beside(self, micro: int) -> int:
        """Bytes of a step beyond activations and one network with its gradients."""
        held = self.memory(micro)
        return max(0, held.total - held.parts.get("activations", 0) - 2 * self._parameters.num_bytes)


class _Trial:
    """A forward and a backward pass on this rank's device; of its own network, whose numbers nobody uses."""

    def __init__(self, asked: Asked, world: World, held: _Held) -> None:
        self._asked, self._device, self._held = asked, world.device, held
        self._objective: Any = None

    def fits(self, micro: int) -> bool:
        """torch.OutOfMemoryError where it does not."""
        asked, device = self._asked, self._device
        try:
            if self._objective is None:
                set_arithmetic(asked.engine)
                network, _ = build_model(replace(asked.model, init_from=None), asked.num_classes, seed=0)
                optimisers.freeze(network, asked.optim)
                recompute_blocks(network, asked.engine)
                self._objective = Objective(network.to(device), asked.optim, asked.engine.precision).train()
            aside = torch.empty(self._held.beside(micro), dtype=torch.uint8, device=device)
            images = torch.randn(micro, 3, asked.image_px, asked.image_px, device=device)
            labels = torch.zeros(micro, dtype=torch.int64, device=device)
            loss, _ = self._objective(images.contiguous(memory_format=torch.channels_last), labels)
            loss.backward()
            loss.item()  # all of it is waited for
            del aside
            return True
        finally:
            self._clear()

    def _clear(self) -> None:
        if self._objective is not None:
            self._objective.zero_grad(set_to_none=True)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._objective = None
        self._clear()


def _nothing_fits(asked: Asked, held: _Held, room: int) -> str:
    least = asked.candidates[-1]
    head = (
        f"micro_batch is auto, and not even {least} image{'s' if least > 1 else ''} a pass fit into a process's memory: a step "
        f"holds {held.bytes(least) / 1e9:.3g} GB and {room / 1e9:.3g} GB are left for it; "
    )
    stages = [s for s in (0, 1, 2, 3) if s >= asked.engine.zero_stage]
    whole: dict[str, Any] = {"activation_checkpointing": True, "checkpointed_share": 1.0, "checkpointed_every": 1}
    for form in ({}, whole):
        for stage in stages:
            try:
                engine = replace(asked.engine, zero_stage=stage, **form)  # type: ignore[arg-type]
                needed = held.bytes(least, engine)
            except ValueError:  # the network cannot, or not with what else is asked for
                continue
            if needed <= room:
                set_ = [
                    f"engine.{name} {str(getattr(engine, name)).removesuffix('.0').lower()}"
                    for name in ("zero_stage", "activation_checkpointing", "checkpointed_share", "checkpointed_every")
                    if getattr(engine, name) != getattr(asked.engine, name)
                ]
                return (
                    head + f"{' and '.join(set_) or 'less beside it on the device'} would fit ({needed / 1e9:.3g} GB)"
                )
    return (
        head
        + "no ZeRO stage and no checkpointing makes it fit; use more or larger devices, or a smaller network or image"
    )
