"""Published weights by name: which haiku parameter of DeepMind's networks is which of ours, and in what layout."""

from __future__ import annotations

import torch

from nfnet.model import NFNet

_LEAVES = {"weight": "w", "gain": "gain", "bias": "bias"}


def haiku_names(model: NFNet) -> dict[str, tuple[str, str]]:
    """Our parameter name -> (haiku module, haiku parameter) of the published NFNets."""
    table = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "stem":
            # The stem's convolutions stand at even places, activations between them.
            index = int(parts[1]) // 2
            table[name] = (f"NFNet/~/stem_conv{index}", _LEAVES[parts[2]])
        elif parts[0] == "final_conv":
            table[name] = ("NFNet/~/final_conv", _LEAVES[parts[1]])
        elif parts[0] == "head":
            table[name] = ("NFNet/~/linear", parts[1][0])
        else:
            block = "NFNet/~/nf_block" + (f"_{parts[1]}" if parts[1] != "0" else "")
            if parts[2] == "skip_gain":
                table[name] = (block, "skip_gain")
            elif parts[2] == "squeeze_excite":
                linear = "linear" if parts[3] == "reduce" else "linear_1"
                table[name] = (f"{block}/~/squeeze_excite/~/{linear}", parts[4][0])
            else:
                table[name] = (f"{block}/~/{parts[2]}", _LEAVES[parts[3]])
    return table


def from_haiku(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """HWIO convolutions -> OIHW, IO linear weights -> OI, the rest as it is; shaped as ours.

    Raises ValueError if the shapes cannot be the same parameter.
    """
    if tensor.dim() == 4:
        tensor = tensor.permute(3, 2, 0, 1)
    elif tensor.dim() == 2:
        tensor = tensor.t()
    elif tensor.dim() == 0:
        tensor = tensor.reshape(1)
    if tensor.shape != shape:
        raise ValueError(f"a published parameter has shape {tuple(tensor.shape)} where the model has {tuple(shape)}")
    return tensor.contiguous()
