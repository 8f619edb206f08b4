"""State dicts of timm's dm_nfnet_*, nfnet_*, nf_resnet* and nf_regnet*, both ways.

timm's dm_ networks multiply the activation by gamma, as ours do, and have a SkipInit gain. The others have neither:
gamma stands in every standardised weight. A gamma before a convolution is the same as one in the activation before
it; what is left over is that of the convolutions that no activation precedes, and that of the last activation,
which no convolution follows. They go into those convolutions' gains and into the classifier's weight.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from nfnet.block import Conventions
from nfnet.layers import GAMMA
from nfnet.model import NFNet
from nfnet.variants import get_variant
from nfnet.weights.state_dict import LoadReport, load_entries, plain_names

_CONVS = {"conv0": "conv1", "conv1": "conv2", "conv1b": "conv2b", "conv2": "conv3", "conv_shortcut": "downsample.conv"}


def timm_options(name: str) -> dict[str, Any]:
    """Options of `create_model` for the network that timm builds under `name`: with them outputs are equal.

    timm's `dm_nfnet_f0` is the published NFNet-F0 (our `nfnet_f0`; `create_model` knows both names), its `nfnet_f0`
    another one. Stochastic depth and dropout are off there and here.

    Raises:
        ValueError: unknown name, with the nearest ones.
    """
    variant = get_variant(name)
    published = name.lower().startswith("dm_")
    options: dict[str, Any] = {
        "ws_eps": 1e-5,
        "stochastic_depth_rescale": True,
        "stochastic_depth_inclusive": True,
        "head_init": "normal",
        "rounded_bottleneck": True,
    }
    if variant.activation == "gelu":
        options["activation"] = "gelu_erf"
    if not published:
        options |= {"padding": "symmetric", "skip_init": None}
    if variant.family != "nfnet":
        options |= {"shortcut": "pool", "width_divisor": 8}
    return options


def timm_names(model: NFNet) -> dict[str, str]:
    """Our parameter name -> timm's."""
    places = [(stage, i) for stage, depth in enumerate(model.variant.depths) for i in range(depth)]
    deep, table = len(model.variant.stem_widths) > 1, {}
    attention = "attn" if model.variant.squeeze_excite == "inside" else "attn_last"
    for name, _ in model.named_parameters():
        first, *rest = name.split(".")
        if first == "stem":
            table[name] = f"stem.conv{int(rest[0]) // 2 + 1 if deep else ''}.{rest[1]}"
        elif first == "blocks":
            stage, i = places[int(rest[0])]
            block = f"stages.{stage}.{i}"
            if rest[1] == "skip_gain":
                table[name] = f"{block}.skipinit_gain"
            elif rest[1] == "squeeze_excite":
                table[name] = f"{block}.{attention}.{'fc1' if rest[2] == 'reduce' else 'fc2'}.{rest[3]}"
            else:
                table[name] = f"{block}.{_CONVS[rest[1]]}.{rest[2]}"
        else:
            table[name] = f"head.fc.{rest[0]}" if first == "head" else name
    return table


def _our_name(name: str, depths: list[int]) -> str:
    """The inverse of `timm_names` for any of the networks; timm's own name for what none of them has."""
    if found := re.fullmatch(r"stem\.conv(\d{0,4})\.(\w+)", name):
        return f"stem.{2 * max(int(found[1] or 1) - 1, 0)}.{found[2]}"
    if name.startswith("head."):
        return f"head.{name.rpartition('.')[2]}"
    found = re.fullmatch(r"stages\.(\d{1,2})\.(\d{1,4})\.(?:(.+)\.)?(\w+)", name)
    if not found:
        return name
    block, place = f"blocks.{sum(depths[: int(found[1])]) + int(found[2])}", found[3]
    if place is None:
        return f"{block}.{'skip_gain' if found[4] == 'skipinit_gain' else found[4]}"
    inner = {v: k for k, v in _CONVS.items()}
    for attention in ("attn", "attn_last"):
        inner |= {f"{attention}.fc1": "squeeze_excite.reduce", f"{attention}.fc2": "squeeze_excite.expand"}
    return f"{block}.{inner.get(place, place)}.{found[4]}"


def _depths(names: Mapping[str, Any]) -> list[int]:
    """Blocks of each stage."""
    places = [found.groups() for name in names if (found := re.match(r"stages\.(\d{1,2})\.(\d{1,4})\.", name))]
    stages = max(int(stage) for stage, _ in places) + 1
    return [max((int(i) + 1 for s, i in places if int(s) == stage), default=0) for stage in range(stages)]


def is_timm(entries: Mapping[str, Any]) -> bool:
    """Whether these are names (`state_dict.plain_names`) of timm's normaliser-free networks."""
    pattern = re.compile(r"stages\.\d{1,2}\.\d{1,4}\.conv1\.gain")
    return any(pattern.fullmatch(k) for k in entries if isinstance(k, str))


def _timm_name(model: NFNet) -> str:
    published = model.variant.family == "nfnet" and model.conventions.skip_init is not None
    return f"dm_{model.variant.name}" if published else model.variant.name


def _leftover_gammas(model: NFNet) -> dict[str, float]:
    """What our parameters are multiplied by where timm's gamma stands in the weights."""
    gamma = GAMMA[model.final_act.name]
    found = {"stem.0.gain": gamma, "head.weight": 1 / gamma}
    return found if model.final_conv is None else {**found, "final_conv.gain": gamma}


def _times(value: torch.Tensor, factor: float) -> torch.Tensor:
    """Rounded once."""
    return value if factor == 1.0 else (value.double() * factor).to(value.dtype)


def _different_options(model: NFNet) -> list[str]:
    """Options that decide the evaluated network and are not those of timm's."""
    wanted = {"activation": model.variant.activation, "shortcut": model.variant.shortcut, "width_divisor": 1}
    wanted |= asdict(Conventions()) | timm_options(_timm_name(model))
    actual = asdict(model.conventions) | {
        "activation": model.final_act.name,
        "shortcut": model.variant.shortcut,
        "width_divisor": model.variant.width_divisor,
    }
    # Where timm has a SkipInit gain, its initial value is no matter.
    actual["skip_init"], wanted["skip_init"] = actual["skip_init"] is None, wanted["skip_init"] is None
    training = ("stochastic_depth_rescale", "stochastic_depth_inclusive")
    return [k for k, v in actual.items() if k not in training and v != wanted[k]]


def from_timm(model: NFNet, state_dict: Mapping[str, Any], source: str = "timm's state dict") -> LoadReport:
    """Load timm's weights. Outputs equal timm's if the model was created with `timm_options`.

    Args:
        state_dict: timm's, or a checkpoint of its training script (averaged weights first).
    Raises:
        ValueError: names or shapes differ.
    """
    theirs, taken = plain_names(state_dict)
    if not is_timm(theirs) or not all(isinstance(v, torch.Tensor) for v in theirs.values()):
        raise ValueError(f"{source} holds no weights of timm's normaliser-free networks; give one of their state dicts")
    gammas = {} if any(k.endswith("skipinit_gain") for k in theirs) else _leftover_gammas(model)
    depths, different = _depths(theirs), _different_options(model)
    note = f"outputs are not timm's, for {', '.join(different)} differ from nfnet.timm_options({_timm_name(model)!r})"
    notes = (*taken, note) if different else taken
    entries = {}
    for name, value in theirs.items():
        own = _our_name(name, depths)
        if own.endswith((".gain", ".skip_gain")):  # (C, 1, 1, 1); no dimensions
            value = value.reshape(-1)
        elif ".squeeze_excite." in own:  # 1x1 convolutions
            value = value.flatten(1) if value.dim() == 4 else value
        entries[own] = _times(value, gammas.get(own, 1.0))
    return load_entries(
        model,
        entries,
        source,
        format="timm",
        notes=notes,
        options="**nfnet.timm_options(NAME), NAME being timm's name of the network that the file is of",
    )


def to_timm(model: NFNet) -> dict[str, torch.Tensor]:
    """The weights under timm's names and in its shapes, for `timm.create_model(...).load_state_dict`.

    timm computes the same if the model was created with `timm_options`. For a network with the published conventions
    timm's dm_nfnet differs in the standardisation's epsilon and in the form of GELU, which is how DeepMind's own weights
    are used there.

    Raises:
        ValueError: timm's blocks cannot compute what the model does (padding, shortcuts, SkipInit, activation).
    """
    different = [k for k in _different_options(model) if k not in ("ws_eps", "activation")]
    if model.final_act.name not in (model.variant.activation, timm_options(_timm_name(model)).get("activation")):
        different.append("activation")
    if different:
        raise ValueError(
            f"timm has no {model.variant.name} with this model's {', '.join(different)}; "
            f"only a network created with **nfnet.timm_options({_timm_name(model)!r}) can be exported to timm"
        )
    return renamed_for_timm(model, {} if model.conventions.skip_init is not None else _leftover_gammas(model))


def renamed_for_timm(model: NFNet, gammas: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Copies of the weights under timm's names, in its shapes, each divided by its entry of `gammas`."""
    weights, found = model.state_dict(), {}
    for own, name in timm_names(model).items():
        value = _times(weights[own].detach(), 1 / gammas[own] if own in gammas else 1.0).clone()
        if own.endswith("skip_gain"):
            value = value.reshape(())
        elif own.endswith(".gain"):
            value = value.reshape(-1, 1, 1, 1)
        elif ".squeeze_excite." in own and own.endswith("weight"):
            value = value[:, :, None, None]
        found[name] = value
    return found
