"""The network of a run: made by name, with fresh weights or those of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

import nfnet
from nfnet.fitting import load_entries
from pipeline import checkpoint
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `nfnet.create_model`: drop_rate, stochastic_depth, activation, ..."""
    init_from: str | None = None
    """A checkpoint or run folder whose weights the run starts from; a head of another size is made anew."""
    init_weights: Literal["evaluated", "ema", "raw"] = "evaluated"
    """evaluated: the averaged weights if that run kept them, else the raw ones."""
    new_head: bool = False
    """Make the head anew even if the checkpoint's has the right size: its classes are those of another task."""


@dataclass(frozen=True)
class LoadedBackbone:
    model: nn.Module
    config: dict[str, Any]
    """The resolved configuration of the run that made the checkpoint."""
    digest: str
    """SHA-256 of the checkpoint's commit file."""
    url: str
    classes: list[str]


def make(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    try:
        return nfnet.create_model(name, num_classes=num_classes, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"model {name}: {error}") from None


def build_model(config: ModelConfig, num_classes: int, *, seed: int) -> tuple[nn.Module, str]:
    """The network on the CPU and one sentence about where its weights come from.

    Initial weights depend on `seed` alone; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config.name, num_classes, config.options)
    if config.init_from is None:
        return model, f"fresh weights from seed {seed}"
    weights, commit = checkpoint.load_weights(config.init_from, config.init_weights)
    theirs = commit.config["model"]["name"]
    if theirs != config.name:
        raise UserError(f"{commit.url} holds a {theirs}, the run asks for a {config.name}; set model.name to {theirs}")
    remade = _load(model, weights, commit.url, new_head=config.new_head)
    head = "its head is made anew" if remade else "head included"
    return model, f"weights of {commit.url} ({head})"


def _load(model: nn.Module, weights: dict[str, torch.Tensor], url: str, *, new_head: bool = False) -> bool:
    """Load by name; True if the head keeps its fresh weights: asked for, or of another size."""
    try:
        return load_entries(model, weights, url, new_head=new_head).head_remade
    except ValueError as error:
        raise UserError(str(error)) from None


def load_backbone(url: str, weights: Literal["evaluated", "ema", "raw"] = "evaluated") -> LoadedBackbone:
    """The network of a checkpoint (or of the newest one in a run folder) with its own head, in evaluation mode."""
    tensors, commit = checkpoint.load_weights(url, weights)
    model = make(commit.config["model"]["name"], len(commit.classes), commit.config["model"]["options"])
    if _load(model, tensors, commit.url):
        raise UserError(
            f"{commit.url} lacks the head of its own {len(commit.classes)} classes; give another checkpoint"
        )
    return LoadedBackbone(model.eval(), commit.config, commit.digest, commit.url, commit.classes)
