"""The seam to DeepSpeed: forward, backward, clip, update, and the state behind them by parameter name.

DeepSpeed always trains fp32 weights here; `precision="bf16"` runs the network under autocast, so activations are bf16 while
weights, gradient sums between devices, momentum and logits stay fp32, which is what the paper states (Brock et al. 2021,
A.1) and what keeps weight standardisation exact. It also leaves four code paths in DeepSpeed to trust instead of a dozen; what
each of them computes is compared with plain PyTorch when a run starts (`pipeline.engine.parity_check`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from nfnet.optim.losses import MixedLabels, TaughtLabels
from nfnet.optim.sgd import SGD, average_keep
from pipeline.distributed import World
from pipeline.engine import optimisers
from pipeline.engine.buffers import Buffers
from pipeline.engine.deepspeed_engine import (
    EngineConfig,
    Objective,
    library_defaults,
    recompute_blocks,
    set_arithmetic,
    start,
)
from pipeline.engine.fragments import Units, products
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.sam_step import sam_losses
from pipeline.engine.state import NamedState
from pipeline.engine.update_stats import Sums, UpdateStats
from pipeline.engine.zero_layout import Place, layout
from pipeline.profiling.ranges import span

MIN_EVALUATION_BATCH = 64
MIN_LOSS_WITH_GRADIENT = 1e-6
"""Below 2^-24 the softmax of the right class is 1 in fp32, and the gradient exactly 0."""


class Engine(NamedState):
    """One rank's share of training a network.

    A step is: `forward_backward` once for each micro-batch, then `update`, which either applies the update on every rank or
    on none.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optim: OptimConfig,
        config: EngineConfig,
        world: World,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        recompute_blocks(network, config)
        self.network, self.world, self.optim = network, world, optim
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.evaluation_batch = max(micro_batch, MIN_EVALUATION_BATCH)
        optim.check_engine(config.zero_stage)
        config.check_device(world.device)
        set_arithmetic(config)
        optimisers.freeze(network, optim)
        trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        self._shapes = {n: tuple(p.shape) for n, p in trained}  # stage 3 empties parameters
        chosen = optimisers.settings(network, optim)
        self._optimizer = optimisers.make(network, chosen, optim)
        self.objective = Objective(network, optim, config.precision)
        self._engine = start(
            self.objective,
            self._optimizer,
            config,
            global_batch=micro_batch * accumulation * world.size,
            micro_batch=micro_batch,
            accumulation=accumulation,
        )
        self._buffers = Buffers(network, world.device, averages=optim.ema_decay is not None)
        # Blocks that are computed again in the backward pass would count their batch twice.
        self._in_backward = self._buffers.unchanged if config.activation_checkpointing else nullcontext
        self._is_sharded = config.zero_stage > 0
        self._layout = layout(self._engine, self._optimizer, config.zero_stage)
        found = [self._layout.place(n, p, self._shapes[n], clip=chosen[n].clip) for n, p in trained]
        self._places: list[Place] = [p for p in found if p is not None]
        self._units = Units(self._shapes, [p.fragment for p in self._places], world.device)
        self._weights = self._units.split([p.fragment.weight for p in self._places])
        names = {id(p): n for n, p in trained}
        self._units_of_groups = [
            self._units.of_parameters([names[id(p)] for p in group["params"]])
            for group in ([] if self._is_sharded else self._optimizer.param_groups)
        ]
        self._sums = Sums.of_network(network, chosen, self._units, optim)
        # Where no gradient arrives the library puts zeros, and weights decay without a word: the first pass tells.
        self.unused = [n for n, _ in trained]
        """Parameters that the first backward pass gave no gradient; all of them before it."""
        self._watches = [p.register_post_accumulate_grad_hook(partial(self._arrived, n)) for n, p in trained]
        self._seen = torch.zeros(3, device=world.device)  # loss, correct, seen: of the current step, this rank

    # --- a step -------------------------------------------------------------------------------------------------------

    def forward_backward(
        self, images: torch.Tensor, labels: torch.Tensor | MixedLabels | TaughtLabels, *, is_last: bool
    ) -> None:
        """One micro-batch; gradients accumulate, and are averaged over ranks with the step's last one."""
        self._engine.train()
        # Said explicitly: the library counts micro-batches by calls of its step(), which is called once an update here.
        self._engine.set_gradient_accumulation_boundary(is_last)
        if self.optim.sam_rho > 0:
            loss, correct = sam_losses(
                self.network, self.objective, self._engine, self._layout, self._buffers, images, labels, self.optim
            )
        else:
            with span("forward"):
                loss, correct = self._engine(images, labels)
            with span("backward"), self._in_backward():
                self._engine.backward(loss)
        while self._watches:
            self._watches.pop().remove()
        self._seen += torch.stack([loss.detach() * len(images), correct, torch.full_like(loss, len(images))])

    def _arrived(self, name: str, _: torch.Tensor) -> None:
        if name in self.unused:
            self.unused.remove(name)

    @torch.no_grad()
    def update(
        self,
        rate: float,
        *,
        stop_requested: bool = False,
        num_lost: float = 0.0,
        lost_allowed: float = math.inf,
        measure: bool = False,
    ) -> UpdateStats:
        """Clip, agree over all ranks that everything is finite, and only then update at this learning rate.

        Args:
            num_lost: samples of this rank that could not be read.
            lost_allowed: for all ranks together, and equal on all; above it the update is skipped.
            measure: also how far the update moves each part (`PartStats.update_ratio`); reads momentum and gradients again.
        """
        measure = measure and isinstance(self._optimizer, SGD)
        with span("clip"):
            gradients = self._units.split(self._layout.gradients(self._places))
            units, stats, moves = self._agree(gradients, (float(stop_requested), num_lost), measure)
        loss_sum, correct, seen, stops, lost = stats.unbind()
        factors = self._sums.factors(units, self.optim)
        parts = self._sums.of_parts(units, factors, rate)
        # The one host synchronisation of a step.
        head = torch.stack([loss_sum / seen, correct / seen, stops, units[1].sum(), seen, lost, moves.sum()])
        numbers = torch.cat([head, parts.view(-1)]).tolist()
        loss, accuracy, stops_seen, gradient_total, num_seen, lost_seen, moved = numbers[:7]
        whole, by_part = self._sums.read(numbers[7:], measured=measure)
        # A loss of exactly nothing (a few images, learnt by heart) has no gradient; a loss that is there must have one.
        clips = self.optim.uses_agc or self.optim.clip == "norm"
        if clips and gradient_total == 0.0 and loss > MIN_LOSS_WITH_GRADIENT:
            raise RuntimeError("clipping is on and saw no gradient at all; the engine lost them, stop and report this")
        applied = all(map(math.isfinite, (loss, gradient_total, moved))) and lost_seen <= lost_allowed
        if applied:
            if whole.clipped_share > 0:
                with span("clip"):
                    self._clip(gradients, factors)
            del gradients
            keep = average_keep(self.optim.ema_decay, self.num_updates)
            with span("update"):
                self._buffers.applied(moves if self.world.size > 1 else None, keep)
                self._apply(rate)
        else:
            self._buffers.skipped()
            self._layout.discard()
        self._seen.zero_()
        return UpdateStats(
            applied=applied,
            loss=loss,
            accuracy=accuracy,
            clipped_share=whole.clipped_share,
            gradient_norm=whole.gradient_norm,
            stop_requested=stops_seen > 0,
            num_samples=round(num_seen),
            num_lost=lost_seen,
            parts=by_part,
        )

    def _clip(self, gradients: list[torch.Tensor], factors: torch.Tensor) -> None:
        """ZeRO's flat partitions have no units, so their gradients are scaled here; without ZeRO our update does it in its
        own pass over memory."""
        if self._is_sharded or not isinstance(self._optimizer, SGD):
            self._units.scale(gradients, factors)
        else:
            self._optimizer.factors = [factors[units] for units in self._units_of_groups]

    def _apply(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self._engine.step()
        if self._engine.skipped_steps:
            raise RuntimeError("DeepSpeed skipped an update that all ranks had agreed on; the run must not go on")

    def _agree(
        self, gradients: list[torch.Tensor], flags: tuple[float, float], measure: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(2 or 6, units) sums of products (`Sums`), the step's statistics, and how far buffers moved in the mean of the ranks;
        equal on every rank: one collective."""
        pairs = [(self._weights, self._weights), (gradients, gradients)]
        if measure:
            states = [p.state_view(self._optimizer, "momentum", create=True) for p in self._places]
            momenta = self._units.split([s for s in states if s is not None])
            pairs += [(gradients, self._weights), (gradients, momenta), (self._weights, momenta), (momenta, momenta)]
        units = torch.stack([self._units.add_up(products(a, b)) for a, b in pairs])
        # Filled on the device: torch.tensor would copy from the host and wait for it.
        stats = torch.cat([self._seen, torch.stack([self._seen.new_full((), flag) for flag in flags])])
        moves = self._buffers.moves()
        if self.world.size > 1:
            # Without ZeRO every rank holds every unit already.
            together = torch.cat([stats, moves, units.view(-1)] if self._is_sharded else [stats, moves])
            dist.all_reduce(together)
            stats, moves, rest = together.split([5, len(moves), len(together) - 5 - len(moves)])
            units, moves = rest.view(len(pairs), -1) if self._is_sharded else units, moves / self.world.size
        return units, stats, moves

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @contextmanager
    def evaluation_network(self) -> Iterator[tuple[nn.Module, str]]:
        """images -> logits in evaluation mode, on averaged weights ("ema") where there are any, else on the raw ones ("raw").

        Averaged and raw weights change places, shard by shard, so there is no second copy of either while it lasts. In
        stage 3 all ranks must make the same number of passes.
        """
        weights: Literal["ema", "raw"] = "ema" if self.has_ema else "raw"
        if weights == "ema":
            self._exchange()
        self.objective.eval()
        try:
            yield self.objective, weights
        finally:
            if weights == "ema":
                self._exchange()
            self.objective.train()

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Passes inside change no buffer and no random number after them. No collective."""
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._buffers.unchanged():
            yield

    @property
    def library_defaults(self) -> dict[str, str]:
        """What the library is set to and we do not say, by name."""
        return library_defaults(self._engine)

    @property
    def reductions(self) -> list[tuple[Any, str]]:
        """(owner, name) of the library's methods that reduce gradients: all that a profile names otherwise than we do."""
        mangled = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
        owned = (
            (self._engine, "allreduce_gradients"),
            *((self._engine.optimizer, n) for n in ("reduce_ipg_grads", mangled)),
        )
        return [(owner, name) for owner, name in owned if hasattr(owner, name)]

    def _exchange(self) -> None:
        self._layout.exchange("ema")
        self._buffers.exchange()

    def close(self) -> None:
        self._engine.destroy()
