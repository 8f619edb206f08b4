"""DeepSpeed as this engine starts it: its dictionary, what it wraps, and what is switched off.

Its own clipping is on by default at norm 1.0 (0.19): it is switched off, and that is asserted.
"""

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from nfnet.network import Network
from nfnet.optim.losses import MixedLabels, TaughtLabels, binary_cross_entropy, label_smoothing_cross_entropy
from pipeline import distributed
from pipeline.configuration import check_fields
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.exchange import local_connections
from pipeline.field_types import Range

BUCKET_ELEMENTS = 500_000_000
"""Gradients that are reduced together, and weights that are gathered together, at most."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of convolutions; weights, normalisation and the update are fp32 in both."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """1: momentum, averaged and master weights are spread over the ranks; 2: gradients too; 3: the network's weights too."""
    tf32: bool = False
    """Round the factors of fp32 convolutions and matrix products on a GPU to TF32's 10 bits, which is no longer fp32."""
    activation_checkpointing: bool = False
    """Keep each block's input only and compute the rest again in the backward pass: less memory, a third more work."""
    checkpointed_share: Annotated[float, Range(0, 1, without="low")] = 1.0
    """Of the blocks, the first ones, to which activation_checkpointing is confined: `normfree plan` says how many are enough."""
    checkpointed_every: Annotated[int, Range(low=1)] = 1
    """Of the blocks in that share, only the first and each that is so many blocks after one; 2 recomputes half of them."""
    compile: Literal["none", "blocks", "network"] = "none"
    """Passes through torch.compile: each kind of block once (blocks), or network and loss as one graph (network); minutes at the
    start, and other rounding (docs/compilation.md)."""
    cuda_graphs: bool = False
    """Record the compiled passes as CUDA graphs and launch each as a whole; on GPUs, with `compile`."""
    parity_check: bool = True
    """Compare steps of a tiny network with plain PyTorch before the run; seconds (`pipeline.engine.parity_check`)."""
    cpu_offload: bool = False
    """Refused: unit norms of offloaded gradients are not exact here."""

    def __post_init__(self) -> None:
        check_fields(self, "engine")
        if self.cpu_offload:
            raise UserError(
                "engine.cpu_offload is not supported: clipping needs the gradients where they are made; "
                "raise engine.zero_stage, or set engine.activation_checkpointing"
            )
        if self.compile != "none" and self.zero_stage == 3:
            raise UserError(
                f"engine.compile is {self.compile} and engine.zero_stage 3, whose gathering of weights before each layer no "
                "graph holds; set engine.compile to none, or engine.zero_stage to 2"
            )
        for name in ("checkpointed_share", "checkpointed_every"):
            if (value := getattr(self, name)) != 1 and not self.activation_checkpointing:
                raise UserError(
                    f"engine.{name} is {value:g} and engine.activation_checkpointing false; set that to true, or "
                    f"engine.{name} to 1"
                )
        if self.cuda_graphs and self.compile == "none":
            raise UserError("engine.cuda_graphs records compiled passes, and engine.compile is none; set it to network")
        if self.cuda_graphs and self.compile == "blocks" and self.activation_checkpointing:
            raise UserError(
                "engine.cuda_graphs cannot record blocks that are computed again in the backward pass; set engine.compile to "
                "network, or engine.activation_checkpointing to false"
            )

    @property
    def recomputed(self) -> tuple[float, int]:
        """(share of the blocks, every which of these)."""
        return self.checkpointed_share if self.activation_checkpointing else 0.0, self.checkpointed_every

    def check_device(self, device: torch.device) -> None:
        """Raises UserError for what this device cannot do."""
        if self.cuda_graphs and device.type != "cuda":
            raise UserError("engine.cuda_graphs is on and there is no GPU here; set engine.cuda_graphs to false")


def recompute_blocks(network: Any, config: EngineConfig) -> None:
    """Have the network compute again in the backward pass what the configuration says. UserError where it cannot."""
    if not config.activation_checkpointing:
        return
    part = [] if config.recomputed == (1.0, 1) else config.recomputed
    if not hasattr(network, "set_grad_checkpointing"):
        raise UserError("this network cannot recompute its blocks; set engine.activation_checkpointing to false")
    if part and not isinstance(network, Network):
        name = "checkpointed_share" if config.checkpointed_share < 1 else "checkpointed_every"
        raise UserError(
            f"engine.{name} is {getattr(config, name):g}, and only our own networks say what their blocks are; set it to 1"
        )
    try:
        network.set_grad_checkpointing(True, *part)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"this network cannot recompute its blocks ({error}); set engine.activation_checkpointing to false"
        ) from None


def set_arithmetic(config: EngineConfig) -> None:
    """How this process's GPU computes; on a CPU it changes nothing. Of the process, as torch has it: the last engine decides."""
    distributed.allow_tf32(config.tf32)
    # A run has one shape of micro-batch, so each convolution is timed once. What wins may differ from start to start: on a
    # GPU a resumed run is equal but for rounding, as it is without this, since its sums have no fixed order.
    torch.backends.cudnn.benchmark = True


class Objective(nn.Module):
    """images, labels -> (mean loss, number of correct top-1 predictions; of a mixed image, of its larger part; of several
    labels an image, where the first is among them)."""

    def __init__(self, network: nn.Module, optim: OptimConfig, precision: str) -> None:
        super().__init__()
        self.network, self.smoothing, self.bf16 = network, optim.label_smoothing, precision == "bf16"
        self.loss = binary_cross_entropy if optim.loss == "binary" else label_smoothing_cross_entropy

    def forward(self, images: torch.Tensor, labels: torch.Tensor | MixedLabels | TaughtLabels | None = None) -> Any:
        """Without labels: logits, as the network gives them. ZeRO's hooks want every pass to begin here."""
        if labels is None:
            return self.logits(images)
        return self.losses(images, labels)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.network(images)
        return found

    def losses(
        self, images: torch.Tensor, labels: torch.Tensor | MixedLabels | TaughtLabels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network(images)
        logits = logits.float()
        loss = self.loss(logits, labels.targets if isinstance(labels, TaughtLabels) else labels, self.smoothing)
        best = logits.detach().argmax(1)
        if isinstance(labels, torch.Tensor) and labels.dim() == 2:
            return loss, (labels.gather(1, best[:, None]) >= 0.5).sum()
        return loss, (best == (labels if isinstance(labels, torch.Tensor) else labels.larger)).sum()


OURS = ("_param_dict", "float16_config", "bfloat16_config.enabled", "timers_config.enabled", "grad_accum_dtype", "global_rank",
        "world_size", "zero_enabled", "zero_optimization_stage", "zero_config.compute_grad_norm", "zero_config.sub_group_size",
        )  # fmt: skip
"""Names in the library's object of what `deepspeed_config` says, or follows from it, or is a rank's own."""


def deepspeed_config(config: EngineConfig, *, global_batch: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from the Run: nobody writes it by hand."""
    # Set though they are its defaults: another release's would change speed, memory or the order of sums in silence.
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        # Gradients are sent from where they are made, and not from a buffer that each is copied into first: bit-equal, a fifth
        # fewer operations, and no buffer of 2 GB. In stage 3 it would save less, and was not measured.
        "contiguous_gradients": config.zero_stage not in (1, 2),
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        # In stages 1 and 2 release 0.19.8 would wait for the whole device at the end of each backward pass, and with gradients
        # that are not copied at each bucket: the host would wait more than once a step.
        "overlap_comm": config.zero_stage == 3,
        "round_robin_gradients": False,  # the layout of its partitions is not known here
    }
    if config.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # we have it already, and the library's costs a collective and a wait
    if config.zero_stage == 3:
        # It updates sub-groups one after the other; more than one a group serves offloading only.
        zero["sub_group_size"] = 1 << 62
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        # Ours updates element by element, so the flat partitions of ZeRO suit it.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},  # autocast over fp32 weights instead
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # On by default, and waits for the whole device before each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def library_defaults(engine: Any) -> dict[str, str]:
    """What an initialised engine's configuration comes to besides what `deepspeed_config` says, by dotted name."""
    found: dict[str, str] = {}
    said = engine._config._param_dict
    ours = {*said, *(f"zero_config.{name}" for name in said["zero_optimization"]), *OURS}

    def enter(value: Any, path: str) -> None:
        value = value.model_dump() if hasattr(value, "model_dump") else value
        if path in ours:
            return
        if isinstance(value, dict):
            for key, each in value.items():
                enter(each, f"{path}.{key}")
        elif value is None or isinstance(value, bool | int | float | str | list | tuple | torch.dtype):
            found[path] = str(value)

    for name, value in vars(engine._config).items():
        enter(value, name)
    return found


def _import_library() -> Any:
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


def start(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    *,
    global_batch: int,
    micro_batch: int,
    accumulation: int,
) -> Any:
    """DeepSpeed's engine around an objective; torch's process group is already there."""
    deepspeed = _import_library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        groups = deepspeed.utils.groups
        if groups._WORLD_GROUP is not None and groups._WORLD_GROUP not in dist.distributed_c10d._world.pg_map:
            groups._WORLD_GROUP = None  # of a process group that an earlier run in this process has left
        engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(
                config, global_batch=global_batch, micro_batch=micro_batch, accumulation=accumulation
            ),
            dist_init_required=False,
        )
    local_connections.refuse_strangers(dist.get_world_size())  # it has made groups of its own
    if engine.gradient_clipping() != 0.0:
        raise RuntimeError(
            "DeepSpeed would clip gradients by their global norm on top of AGC; this version is not usable"
        )
    return engine
