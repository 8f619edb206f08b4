"""The seam to DeepSpeed: forward, backward, clip, update, and the state behind them by parameter name.

DeepSpeed always trains fp32 weights here; `precision="bf16"` runs the network under autocast, so activations are bf16 while
weights, gradient sums between devices, momentum and logits stay fp32, which is what the paper states (Brock et al. 2021,
A.1) and what keeps weight standardisation exact. It also leaves two code paths in DeepSpeed to trust instead of five: plain
(stage 0) and partitioned (stage 1).

DeepSpeed's own clipping is on by default at norm 1.0 (0.19): it is switched off, and that is asserted.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

import nfnet.agc as agc
from nfnet.groups import assign, param_groups
from nfnet.losses import MixedLabels, label_smoothing_cross_entropy
from nfnet.optim import SGD
from pipeline.update import Fragment, OptimConfig, scale_units, unit_sums
from pipeline.world import World
from pipeline.zero import Place, gradient_pieces, places

Kind = Literal["weights", "momentum", "ema"]

MIN_LOSS_WITH_GRADIENT = 1e-6
"""Below 2^-24 the softmax of the right class is 1 in fp32, and the gradient exactly 0."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1] = 0
    """1: momentum, averaged and master weights are spread over the ranks."""


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What all ranks know about one update, after they agreed on it."""

    applied: bool
    loss: float
    accuracy: float
    clipped_share: float
    gradient_norm: float
    stop_requested: bool
    """Some rank was asked to stop."""
    num_samples: int
    """Images that the step saw, on all ranks."""
    num_lost: float
    """Samples that could not be read, on all ranks; infinite where a whole micro-batch could not. Above what was allowed,
    the update is left out."""


class _Objective(nn.Module):
    """images, labels -> (mean loss, number of correct top-1 predictions; of a mixed image, of its larger part)."""

    def __init__(self, network: nn.Module, smoothing: float, precision: str) -> None:
        super().__init__()
        self.network, self.smoothing, self.bf16 = network, smoothing, precision == "bf16"

    def forward(self, images: torch.Tensor, labels: torch.Tensor | MixedLabels) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(images)
        logits = logits.float()
        loss = label_smoothing_cross_entropy(logits, labels, self.smoothing)
        classes = labels.larger if isinstance(labels, MixedLabels) else labels
        return loss, (logits.detach().argmax(1) == classes).sum()


def deepspeed_config(config: EngineConfig, *, global_batch: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from the Run: nobody writes it by hand."""
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        # Ours updates element by element, so the flat partitions of ZeRO suit it.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
    }


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet and without its shared-memory operator.

    That operator is compiled when the library starts on a CPU (half a minute, a C++ compiler) and serves one inference
    call that is never made here.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
        from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
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
        deepspeed = _import_deepspeed()
        if set(network.state_dict()) != {n for n, _ in network.named_parameters()}:
            raise ValueError("the network has buffers, and this engine keeps and restores parameters only")
        self.network, self.world, self.optim, self.accumulation = network, world, optim, accumulation
        self._names = [n for n, _ in network.named_parameters()]
        self._shapes = {n: tuple(p.shape) for n, p in network.named_parameters()}
        rules = assign(list(network.named_parameters()))
        groups = param_groups(
            network,
            lr=optim.learning_rate,
            weight_decay=optim.weight_decay,
            head_lr_scale=optim.head_learning_rate_scale,
        )
        optimizer = SGD(groups, lr=optim.learning_rate, momentum=optim.momentum, ema_decay=optim.ema_decay)
        global_batch = micro_batch * accumulation * world.size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
            self._engine, *_ = deepspeed.initialize(
                model=_Objective(network, optim.label_smoothing, config.precision),
                optimizer=optimizer,
                config=deepspeed_config(
                    config, global_batch=global_batch, micro_batch=micro_batch, accumulation=accumulation
                ),
                dist_init_required=False,
            )
        if self._engine.gradient_clipping() != 0.0:
            raise RuntimeError(
                "DeepSpeed would clip gradients by their global norm on top of AGC; this version is not usable"
            )
        self._optimizer, self._is_sharded = optimizer, config.zero_stage > 0
        self._zero = self._engine.optimizer if self._is_sharded else None
        self._places: list[Place] = places(network, optimizer, self._zero, {n: r.clip for n, r in rules.items()})
        self._start_of_units: dict[str, int] = {}
        clip_mask = []
        num_units = 0
        for name in self._names:
            units = self._shapes[name][0] if len(self._shapes[name]) > 1 else 1
            self._start_of_units[name] = num_units
            clip_mask.append(torch.full((units,), rules[name].clip))
            num_units += units
        self._num_units, self._clip_mask = num_units, torch.cat(clip_mask).to(world.device)
        self._sums = torch.zeros(3, device=world.device)  # loss, correct, seen: of the current step, this rank

    # --- a step -------------------------------------------------------------------------------------------------------

    def forward_backward(self, images: torch.Tensor, labels: torch.Tensor | MixedLabels, *, is_last: bool) -> None:
        """One micro-batch; gradients accumulate, and are averaged over ranks with the step's last one."""
        self._engine.train()
        # Said explicitly: the library counts micro-batches by calls of its step(), which is called once an update here.
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss, correct = self._engine(images, labels)
        self._engine.backward(loss)
        self._sums += torch.stack([loss.detach() * len(images), correct, torch.full_like(loss, len(images))])

    def update(
        self, rate: float, *, stop_requested: bool = False, num_lost: float = 0.0, lost_allowed: float = math.inf
    ) -> UpdateStats:
        """Clip, agree over all ranks that everything is finite, and only then update at this learning rate.

        `num_lost` is this rank's; `lost_allowed` is for all ranks together, and equal on all.
        """
        gradients = gradient_pieces(self._places, self._zero)
        weight_squares, gradient_squares, stats = self._agree(gradients, stop_requested, num_lost)
        loss_sum, correct, seen, stops, lost = stats.unbind()
        coefficients = torch.ones_like(gradient_squares)
        if self.optim.clipping > 0:
            clipped = agc.coefficients(weight_squares, gradient_squares, self.optim.clipping, self.optim.clipping_eps)
            coefficients = torch.where(self._clip_mask, clipped, coefficients)
        norm = (gradient_squares * coefficients.square()).sum().sqrt()
        share = (coefficients < 1).sum() / self._clip_mask.sum()
        # The one host synchronisation of a step.
        values = torch.stack(
            [loss_sum / seen, correct / seen, share, norm, stops, gradient_squares.sum(), seen, lost]
        ).tolist()
        loss, accuracy, clipped_share, gradient_norm, stops_seen, gradient_total, num_seen, lost_seen = values
        # A loss of exactly nothing (a few images, learnt by heart) has no gradient; a loss that is there must have one.
        if self.optim.clipping > 0 and gradient_total == 0.0 and loss > MIN_LOSS_WITH_GRADIENT:
            raise RuntimeError("AGC is on and saw no gradient at all; the engine lost them, stop and report this")
        applied = math.isfinite(loss) and math.isfinite(gradient_total) and lost_seen <= lost_allowed
        if applied:
            if self.optim.clipping > 0 and clipped_share > 0:
                self._scale(gradients, coefficients)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            self._engine.step()
            if self._engine.skipped_steps:
                raise RuntimeError("DeepSpeed skipped an update that all ranks had agreed on; the run must not go on")
        else:
            self._discard()
        self._sums.zero_()
        return UpdateStats(
            applied=applied,
            loss=loss,
            accuracy=accuracy,
            clipped_share=clipped_share,
            gradient_norm=gradient_norm,
            stop_requested=stops_seen > 0,
            num_samples=round(num_seen),
            num_lost=lost_seen,
        )

    def _agree(
        self, gradients: list[torch.Tensor], stop_requested: bool, num_lost: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squares of all units' weights and gradients, and the step's statistics, equal on every rank: one collective."""
        units = torch.zeros(2, self._num_units, device=self.world.device)
        for place, gradient in zip(self._places, gradients, strict=True):
            start = self._start_of_units[place.fragment.name]
            span = slice(start, start + place.fragment.num_units)
            units[0, span] = unit_sums(place.fragment, place.fragment.weight)
            units[1, span] = unit_sums(place.fragment, gradient)
        flags = torch.tensor([float(stop_requested), num_lost], device=self.world.device)
        stats = torch.cat([self._sums, flags])
        if self.world.size > 1:
            if self._is_sharded:
                together = torch.cat([units.view(-1), stats])
                dist.all_reduce(together)
                units, stats = together[:-5].view(2, -1), together[-5:]
            else:  # every rank holds every unit already
                dist.all_reduce(stats)
        return units[0], units[1], stats

    def _scale(self, gradients: list[torch.Tensor], coefficients: torch.Tensor) -> None:
        for place, gradient in zip(self._places, gradients, strict=True):
            if place.fragment.clip:
                start = self._start_of_units[place.fragment.name]
                scale_units(place.fragment, gradient, coefficients[start : start + place.fragment.num_units])

    def _discard(self) -> None:
        """Forget the gradients of a step, as if its batches had not been seen."""
        if self._zero is not None:
            for group in self._zero.averaged_gradients:
                self._zero.averaged_gradients[group] = None
                self._zero.all_grad_tensors[group] = None
            self._zero.zero_grad(set_to_none=True)
        else:
            self._engine.zero_grad()

    # --- state by name ------------------------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        return int(self._optimizer.param_groups[0].get("num_updates", 0))

    @property
    def has_ema(self) -> bool:
        return self.optim.ema_decay is not None and self.num_updates > 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def _views(self, kind: Kind, *, create: bool = False) -> Iterator[tuple[Fragment, torch.Tensor]]:
        for place in self._places:
            view = place.state_view(self._optimizer, kind, create=create)
            if view is not None:
                yield place.fragment, view

    def local_fragments(self) -> dict[str, torch.Tensor]:
        """This rank's part of the state, "kind/name@start" -> flat fp32 tensor; each element on exactly one rank."""
        if not self._is_sharded and not self.world.is_main:
            return {}
        kinds: tuple[Kind, ...] = ("weights", "momentum", "ema")
        return {f"{k}/{f.name}@{f.start}": v.detach() for k in kinds for f, v in self._views(k)}

    def restore(self, state: dict[str, dict[str, torch.Tensor]], num_updates: int) -> None:
        """Whole tensors by kind and name, from a checkpoint of any number of ranks and any stage."""
        kinds: tuple[Kind, ...] = ("weights", "momentum", "ema")
        for kind in kinds:
            if kind not in state:
                continue
            for fragment, view in self._views(kind, create=True):
                whole = state[kind][fragment.name].reshape(-1)
                view.copy_(whole[fragment.start : fragment.start + view.numel()])
        for group in self._optimizer.param_groups:
            group["num_updates"] = num_updates
        if self._zero is not None:
            self._zero.update_lp_params()

    def gather(self, kind: Kind) -> dict[str, torch.Tensor]:
        """Whole tensors on every rank, copied."""
        numels = [math.prod(self._shapes[n]) for n in self._names]
        flat = torch.zeros(sum(numels), device=self.world.device)
        parts = dict(zip(self._names, flat.split(numels), strict=True))
        for fragment, view in self._views(kind):
            parts[fragment.name][fragment.start : fragment.start + view.numel()] = view.reshape(-1)
        if self._is_sharded and self.world.size > 1:
            dist.all_reduce(flat)
        return {n: parts[n].view(self._shapes[n]) for n in self._names}

    @contextmanager
    def evaluation_network(self) -> Iterator[tuple[nn.Module, str]]:
        """The network in evaluation mode on averaged weights ("ema") where there are any, else on the raw ones ("raw")."""
        raw: dict[str, torch.Tensor] | None = None
        parameters = dict(self.network.named_parameters())
        if self.has_ema:
            raw = {n: p.detach().clone() for n, p in parameters.items()}
            self._put(parameters, self.gather("ema"))
        self.network.eval()
        try:
            yield self.network, "ema" if raw is not None else "raw"
        finally:
            if raw is not None:
                self._put(parameters, raw)
            self.network.train()

    @staticmethod
    @torch.no_grad()
    def _put(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])

    def close(self) -> None:
        self._engine.destroy()
