"""A network in numbers: stages, parameters, multiply-adds, features, activation memory. No weights, no arithmetic."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nfnet.analysis.activation_memory import ActivationMemory, activation_memory
from nfnet.analysis.flops import count_parameters, meta_copy, multiply_adds
from nfnet.analysis.signal_propagation import channels_last, residual_blocks, shortcut_of
from nfnet.layers import WSConv2d


class Stage(NamedTuple):
    """Successive blocks of one width and resolution."""

    depth: int
    width: int
    inner: int
    """Channels of the blocks' 3x3 convolutions, in ...; 0 where they have none."""
    groups: int
    px: int
    """Side of its maps at the training resolution; of tokens without a place, their number."""
    is_map: bool = True


class Feature(NamedTuple):
    num_chs: int
    reduction: int
    module: str


@dataclass(frozen=True)
class Summary:
    name: str
    num_parameters: int
    num_features: int
    stages: list[Stage]
    feature_info: list[Feature]
    multiply_adds: dict[str, tuple[int, int]]
    """What the resolution is for -> (px, multiply-adds of one image)."""
    batch: int
    memory: dict[str, ActivationMemory]
    """Precision -> activations of `batch` images at the first resolution."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: names and numbers only."""
        return {
            "name": self.name,
            "num_parameters": self.num_parameters,
            "num_features": self.num_features,
            "stages": [s._asdict() for s in self.stages],
            "feature_info": [f._asdict() for f in self.feature_info],
            "multiply_adds": [{"for": k, "px": px, "count": n} for k, (px, n) in self.multiply_adds.items()],
            "activation_memory": {
                "batch": self.batch,
                "px": next(iter(self.multiply_adds.values()))[0],
                **{k: {f"{name}_bytes": n for name, n in vars(m).items()} for k, m in self.memory.items()},
            },
        }

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{self.name}: {self.num_parameters:,} parameters (1000 classes), {self.num_features} features"]
        for i, s in enumerate(self.stages, 1):
            inner = f", inner {s.inner} in {s.groups} group{'s' * (s.groups != 1)}" if s.inner else ""
            maps = f"maps of {s.px}x{s.px}" if s.is_map else f"{s.px} tokens"
            lines.append(f"  stage {i}: {s.depth:2} blocks, width {s.width}{inner}, {maps}")
        if not self.stages:
            lines.append(
                "  stages: not known, since none of its modules is a block by its class or by the network's own words"
            )
        if self.feature_info:
            runs = itertools.groupby(f"{f.num_chs} at 1/{f.reduction}" for f in self.feature_info)
            counted = ((text, len(list(run))) for text, run in runs)
            lines.append("  features: " + ", ".join(f"{text} ({n} times)" if n > 1 else text for text, n in counted))
        for label, (px, count) in self.multiply_adds.items():
            lines.append(f"  {count / 1e9:9.3f} G multiply-adds at {px} px ({label})")
        px = next(iter(self.multiply_adds.values()))[0]
        lines.append(f"  activations kept for the backward pass, {self.batch} images of {px} px:")
        for precision, memory in self.memory.items():
            text = f"    {precision}: {_gib(memory.kept)}"
            if memory.checkpointed is not None:
                text += (
                    f"; with activation checkpointing {_gib(memory.checkpointed)}, "
                    f"and {_gib(memory.largest_block)} while a block is computed again"
                )
            lines.append(text)
        return lines


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def summarise(model: nn.Module, name: str, sizes: Mapping[str, int], *, batch: int = 8, in_chans: int = 3) -> Summary:
    """
    Args:
        model: ours, or any other that takes images; the meta device will do. Stages are the residual blocks that
            `nfnet.analysis.signal_propagation` finds, and none where it finds none.
        sizes: what for -> px; stages and memory are those of the first.
        batch: images, for activation memory.
    """
    px = next(iter(sizes.values()))
    meta = meta_copy(model)
    info = getattr(model, "feature_info", [])
    features = (
        info.get_dicts() if hasattr(info, "get_dicts") else [f if isinstance(f, dict) else f._asdict() for f in info]
    )
    return Summary(
        name=name,
        num_parameters=count_parameters(model),
        num_features=int(getattr(model, "num_features", 0)),
        stages=_stages(meta, torch.empty(1, in_chans, px, px, device="meta")),
        feature_info=[Feature(f["num_chs"], f["reduction"], f["module"]) for f in features],
        multiply_adds={label: (size, multiply_adds(model, size, in_chans=in_chans)) for label, size in sizes.items()},
        batch=batch,
        memory={
            precision: activation_memory(model, px, batch=batch, in_chans=in_chans, precision=precision)
            for precision in ("fp32", "bf16")
        },
    )


@torch.no_grad()
def _stages(meta: nn.Module, images: torch.Tensor) -> list[Stage]:
    shapes: list[torch.Size] = []
    try:
        blocks = residual_blocks(meta)
    except ValueError:
        return []
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape))
    meta.eval()(images)
    stages: list[Stage] = []
    for block, shape in zip(blocks, shapes, strict=True):
        inner, groups = _inner(block)
        width, px = (shape[-1], shape[1]) if channels_last(shape) else (shape[1], shape[2])
        if stages and (stages[-1].width, stages[-1].px) == (width, px):
            # The last block speaks for the stage: the first may have another inner width (NF-RegNet).
            stages[-1] = Stage(stages[-1].depth + 1, width, inner, groups, px, len(shape) == 4)
        else:
            stages.append(Stage(1, width, inner, groups, px, len(shape) == 4))
    return stages


def _inner(block: nn.Module) -> tuple[int, int]:
    """Channels and groups of the branch's last convolution that is not 1x1; (0, 1) without convolutions."""
    shortcut = shortcut_of(block)
    aside: Sequence[nn.Module] = [] if shortcut is None else list(shortcut.modules())
    convs = [m for m in block.modules() if isinstance(m, WSConv2d | nn.Conv2d) and m not in aside]
    spatial = [m for m in convs if m.weight.shape[-1] > 1] or convs
    return (spatial[-1].weight.shape[0], spatial[-1].groups) if spatial else (0, 1)
