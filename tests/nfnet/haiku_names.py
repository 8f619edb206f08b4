"""How DeepMind's code names the parameters of our networks."""

from nfnet.model import NFNet

_LEAVES = {"weight": "w", "gain": "gain", "bias": "bias"}
_ROOTS = {"nfnet": "NFNet", "nf_resnet": "NF_ResNet", "nf_regnet": "NF_RegNet"}
_BLOCKS = {"nfnet": "nf_block", "nf_resnet": "nf_res_block", "nf_regnet": "nf_block"}


def haiku_names(model: NFNet) -> dict[str, tuple[str, str]]:
    """Our parameter name -> (haiku module, haiku parameter) of the published networks, all three families."""
    family = model.variant.family
    root = f"{_ROOTS[family]}/~"
    table = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "stem":
            # The stem's convolutions stand at even places, activations between them.
            stem = f"stem_conv{int(parts[1]) // 2}" if family == "nfnet" else "initial_conv"
            table[name] = (f"{root}/{stem}", _LEAVES[parts[2]])
        elif parts[0] == "final_conv":
            table[name] = (f"{root}/final_conv", _LEAVES[parts[1]])
        elif parts[0] == "head":
            table[name] = (f"{root}/linear", parts[1][0])
        else:
            block = f"{root}/{_BLOCKS[family]}" + (f"_{parts[1]}" if parts[1] != "0" else "")
            if parts[2] == "skip_gain":
                table[name] = (block, "skip_gain")
            elif parts[2] == "squeeze_excite":
                linear = "linear" if parts[3] == "reduce" else "linear_1"
                table[name] = (f"{block}/~/squeeze_excite/~/{linear}", parts[4][0])
            else:
                table[name] = (f"{block}/~/{parts[2]}", _LEAVES[parts[3]])
    return table
