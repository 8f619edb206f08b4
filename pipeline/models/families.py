"""Of which family a network is, for what the literature of that family says of its training. Decided here and nowhere else.

    nfnet       normaliser-free: ours, timm's of the module nfnet, trunks whose method clips
    resnet      normalised convolutional networks trained by SGD: ResNets (BatchNorm or, as BiT, GroupNorm) and their like
    vit         plain vision transformers: ViT, DeiT, BEiT, EVA, CaiT
    convnext    ConvNeXt 1 and 2
    swin        Swin 1 and 2

A network of any other make is taken for one of these by whether it has batch normalisation, and the answer says so.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from nfnet.normalizers.registry import get_method
from pipeline.models import timm_models, trunks
from pipeline.models.backbone import make

Family = Literal["nfnet", "resnet", "vit", "convnext", "swin"]
_RESNETS = """resnet resnetv2 resnest res2net sknet senet regnet densenet vgg dla dpn hrnet byobnet byoanet cspnet selecsls
tresnet vovnet rexnet xception xception_aligned inception_v3 inception_v4 inception_resnet_v2 efficientnet mobilenetv3 ghostnet
hardcorenas"""
_VITS = "vision_transformer vision_transformer_relpos vision_transformer_hybrid deit beit eva cait"
MODULES: dict[Family, tuple[str, ...]] = {
    "nfnet": ("nfnet",),
    "resnet": tuple(_RESNETS.split()),
    "vit": tuple(_VITS.split()),
    "convnext": ("convnext",),
    "swin": ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"),
}
"""Modules of timm whose networks are of a family."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What is known of a network by its name and options."""

    family: Family
    has_batch_norm: bool
    """torch's, which `model.batch_norm` is about; trunks have one of their own."""
    guess: str = ""
    """What a network of no known family was taken for, and by what; "" where it is known."""


def kind_of(model: str, options: dict[str, Any]) -> Kind:
    """Of a network, made without memory for its weights.

    Args:
        model: as `ModelConfig.name`.
        options: of the network.
    Raises:
        UserError: there is no such network.
    """
    key = model, repr(sorted(options.items()))
    if key not in _FOUND:
        _FOUND[key] = _kind_of(model, options)
    return _FOUND[key]


_FOUND: dict[tuple[str, str], Kind] = {}
"""A sweep asks for every trial."""


def _kind_of(model: str, options: dict[str, Any]) -> Kind:
    with torch.device("meta"):
        network = make(model, 2, options)
    has_batch_norm = any(isinstance(m, _BatchNorm) for m in network.modules())
    if trunks.is_trunk(model):
        clips = get_method(str(options.get("method", "batch_norm"))).clipping > 0
        return Kind(family="nfnet" if clips else "resnet", has_batch_norm=has_batch_norm)
    if not timm_models.is_timm(model):
        return Kind(family="nfnet", has_batch_norm=has_batch_norm)
    trunk: Any = network.get_submodule("trunk")
    module = type(trunk).__module__.rpartition(".")[2]
    for family, modules in MODULES.items():
        if module in modules:
            return Kind(family=family, has_batch_norm=has_batch_norm)
    taken, why = _taken(has_batch_norm, hasattr(trunk, "group_matcher"))
    guess = f"timm's {module} is of no family that is known here; taken for {taken}, since {why}"
    return Kind(family=taken, has_batch_norm=has_batch_norm, guess=guess)


def _taken(has_batch_norm: bool, has_layers: bool) -> tuple[Family, str]:
    if has_batch_norm:
        return "resnet", "it has batch normalisation"
    if not has_layers:
        return "resnet", "timm does not say which layers it has, which rates that fall from layer to layer need"
    return "vit", "it has no batch normalisation"
