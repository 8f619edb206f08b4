"""A network as timm's `NormFreeNet` with arguments of its own: what that class can express goes far beyond its named models.

`nfnet.to_timm` maps onto timm's models as they are. Here each size and convention is stated, so that the published
conventions (paddings, SkipInit gains, gamma in the activation, exact widths) come along too, in files that carry
arguments besides the weights (the `model_args` of timm's `config.json`).
"""

from typing import Any, NamedTuple

import torch

from nfnet.model import NFNet
from nfnet.variants import Variant
from nfnet.weights.timm import renamed_for_timm

_BASES = {"nfnet": "dm_nfnet_f0", "nf_resnet": "nf_resnet50", "nf_regnet": "nf_regnet_b0"}
_NAMED = {
    "nfnet": [f"f{n}" for n in range(7)],
    "nf_resnet": ["50", "101"],
    "nf_regnet": [f"b{n}" for n in range(6)],
}
_ACTIVATIONS = ("identity", "relu", "silu", "leaky_relu", "tanh", "elu", "celu", "selu", "softplus", "sigmoid", "relu6")
"""Of both libraries, with the same constants. timm's gelu is the exact one, our gelu_erf."""
_NO_EPS = 1e-12
"""The published code floors var * fan_in and adds nothing; timm always adds, and this is less than fp32 can tell."""


class TimmForm(NamedTuple):
    architecture: str
    """A name that timm knows, of the same family; its sizes are overridden by `arguments`."""
    arguments: dict[str, Any]
    """Keyword arguments of `timm.create_model`, without the number of classes."""
    weights: dict[str, torch.Tensor]
    approximations: tuple[str, ...]
    """What timm computes a little differently, in words; empty = only rounding differs."""


def timm_form(model: NFNet) -> TimmForm:
    """How timm expresses the network in evaluation mode (stochastic depth and dropout are left at none).

    Raises:
        ValueError: timm's blocks cannot compute what the model does; each reason is named.
    """
    variant, conventions = model.variant, model.conventions
    reasons = _missing(model)
    if reasons:
        raise ValueError(f"timm cannot express this {variant.name}: {'; '.join(reasons)}")
    activation = model.final_act.name
    approximations = ("timm computes GELU exactly, the network by the tanh formula",) if activation == "gelu" else ()
    arguments: dict[str, Any] = {
        "depths": list(variant.depths),
        "channels": list(variant.widths),
        "alpha": conventions.alpha,
        "stem_chs": variant.stem_widths[-1],
        "group_size": variant.group_width or None,
        "width_factor": 1.0,
        "bottle_ratio": _ratio(variant),
        "num_features": variant.final_width,
        "ch_div": variant.width_divisor,
        "extra_conv": variant.second_3x3,
        "gamma_in_act": True,
        "same_padding": conventions.padding == "same",
        "std_conv_eps": _NO_EPS if conventions.ws_eps is None else conventions.ws_eps,
        "skipinit": conventions.skip_init is not None,
        "act_layer": "gelu" if activation in ("gelu", "gelu_erf") else activation,
    }
    if variant.squeeze_excite != "none":
        arguments["attn_kwargs"] = {"rd_ratio": variant.se_ratio, "rd_divisor": variant.width_divisor}
    return TimmForm(_architecture(variant), arguments, renamed_for_timm(model, {}), approximations)


def _architecture(variant: Variant) -> str:
    size = variant.name.rsplit("_", 1)[-1].removeprefix("resnet")
    if size not in _NAMED[variant.family]:
        return _BASES[variant.family]
    prefix = {"nfnet": "dm_nfnet_", "nf_resnet": "nf_resnet", "nf_regnet": "nf_regnet_"}[variant.family]
    return prefix + size


def _ratio(variant: Variant) -> float:
    """timm rounds inner widths to the nearest whole number, our nf_regnets down: a ratio a little smaller gives the same.

    Where there is none, shapes differ, which whoever loads the weights finds.
    """
    if not variant.expansion or variant.width_divisor > 1:
        return variant.expansion or variant.bottleneck
    group = variant.group_width or 1
    for step in range(200):
        ratio = round(variant.expansion - step * 1e-4, 4)
        if all(int(w * ratio + 0.5) // group == int(w * variant.expansion) // group for w in variant.widths):
            return ratio
    return variant.expansion


def _missing(model: NFNet) -> list[str]:
    """What of the model timm's class has no argument for."""
    variant, conventions = model.variant, model.conventions
    found = []
    if (stem := _stem_of_timm(variant)) != (variant.stem_widths, variant.stem_strides):
        widths, strides = (", ".join(map(str, values)) for values in (variant.stem_widths, variant.stem_strides))
        theirs = f" (with {', '.join(map(str, stem[0]))} and {', '.join(map(str, stem[1]))})" if stem[0] else ""
        found.append(f"it has no stem of widths {widths} and strides {strides}{theirs}")
    # Its first stage has stride 2 exactly where the stem has no more than 2.
    if variant.strides != (2 if variant.family == "nf_regnet" else 1, 2, 2, 2):
        found.append(f"it has no stages of strides {', '.join(map(str, variant.strides))}")
    if variant.shortcut != "pool":
        found.append("its shortcuts lose resolution by pooling, not by a stride")
    if variant.stem_pool and conventions.padding == "same":
        found.append("its max pool pads symmetrically")
    if (variant.squeeze_excite == "inside") != bool(variant.expansion):
        found.append("it ties the place of squeeze-excite to how inner widths are counted")
    if conventions.beta_first:
        found.append("it scales after the activation, not before")
    if variant.squeeze_excite != "none" and conventions.se_activation != "relu":
        found.append(f"its squeeze-excite has no {conventions.se_activation}")
    if model.final_act.name not in (*_ACTIVATIONS, "gelu", "gelu_erf"):
        found.append(f"it has no activation {model.final_act.name}")
    return found


def _stem_of_timm(variant: Variant) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(widths, strides) of the stem that the family has there, given its last width."""
    last = variant.stem_widths[-1]
    if variant.family == "nfnet":
        return (last // 8, last // 4, last // 2, last), (2, 1, 1, 2)
    return (last,), (2,)
