"""Floor 0: the mathematics of normaliser-free networks. torch only; no files, no processes, no logging."""

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from nfnet.analysis.signal_propagation import SignalPropagation, signal_propagation
from nfnet.analysis.signal_theory import predict
from nfnet.analysis.summary import Summary, summarise
from nfnet.block import Conventions
from nfnet.model import NFNet
from nfnet.optim.agc import ClipCounts, adaptive_clip_grad_
from nfnet.optim.sam import SamReport, sam_backward
from nfnet.variants import VARIANTS, adjust, get_variant
from nfnet.weights.files import load_published, read_description, save_weights
from nfnet.weights.state_dict import LoadReport
from nfnet.weights.timm import from_timm, timm_options, to_timm

__all__ = [
    "ClipCounts",
    "LoadReport",
    "NFNet",
    "SamReport",
    "SignalPropagation",
    "Summary",
    "adaptive_clip_grad_",
    "create_model",
    "from_timm",
    "list_models",
    "load_model",
    "load_published",
    "predict",
    "sam_backward",
    "save_weights",
    "signal_propagation",
    "summarise",
    "timm_options",
    "to_timm",
]


def list_models() -> list[str]:
    return sorted(VARIANTS)


OPTIONS = ("in_chans", "activation", "drop_rate", "stochastic_depth", "head_init")
CONVENTIONS = tuple(field.name for field in fields(Conventions))
VARIANT_OPTIONS = ("rounded_bottleneck", "shortcut", "width_divisor", "widths", "second_3x3")


def create_model(name: str, num_classes: int = 1000, **options: Any) -> NFNet:
    """A network by name, with fresh weights.

    Args:
        name: one of `list_models()`; `nfnet_f4+` is `nfnet_f4_plus`.
        num_classes: 0 for pooled features instead of logits.
        options: `in_chans`, `activation`, `drop_rate`, `stochastic_depth`, `head_init` of `NFNet`; each field of
            `Conventions`, where papers, published code and timm differ; and of the variant

            - `rounded_bottleneck`: inner widths rounded down to the group width, as the released code builds the plus
              variants (the default keeps the 192 channels that the paper's 527M parameters of F4+ need);
            - `shortcut`: "pool" or "stride", how a shortcut loses resolution;
            - `widths`, `second_3x3`: the path from SE-ResNeXt-D to NFNet (2021b, table 2), which starts at False and widths
              that double from stage to stage;
            - `width_divisor`: stage widths rounded to a multiple of it, as timm rounds its nf_regnets (8).
    Raises:
        ValueError: unknown name (with the nearest ones) or option.
    """
    known = OPTIONS + CONVENTIONS + VARIANT_OPTIONS
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no option {unknown[0]!r}; {hint}the options are {', '.join(known)}")
    variant = adjust(get_variant(name), **{k: v for k, v in options.items() if k in VARIANT_OPTIONS})
    conventions = Conventions(**{k: v for k, v in options.items() if k in CONVENTIONS})
    model = NFNet(variant, num_classes, conventions=conventions, **{k: v for k, v in options.items() if k in OPTIONS})
    model.options = dict(options)
    return model


def load_model(path: str | Path) -> NFNet:
    """The network of a file that `save_weights` wrote, in evaluation mode; random state is left as it was.

    Raises:
        ValueError: the file is of another kind, or damaged.
    """
    name, num_classes, options = read_description(path)
    with torch.random.fork_rng(devices=[]):
        model = create_model(name, num_classes, **options)
    if load_published(model, path).head_remade:
        raise ValueError(f"{path} lacks the head of its {num_classes} classes; save it again")
    return model.eval()
