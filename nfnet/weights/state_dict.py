"""Entries of a file into a network: what fits is loaded, what does not is reported, and nothing is half loaded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nfnet.model import NFNet
from nfnet.variants import VARIANTS


@dataclass(frozen=True)
class LoadReport:
    """What was loaded; as text one sentence."""

    source: str
    format: str
    """haiku, timm or normfree."""
    num_loaded: int
    """Parameters (tensors) that have the file's values."""
    head_remade: bool
    """The head was absent, of another size, or not wanted: the network keeps the fresh one that it had."""
    notes: tuple[str, ...] = ()
    head_classes: int = 0
    """Of the file's head, which may have another size than the network's; 0 = it has none."""

    def __str__(self) -> str:
        head = ("the head is made anew",) if self.head_remade else ()
        return "; ".join((f"{self.num_loaded} parameters from {self.source} ({self.format})", *head, *self.notes))


_CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model")
"""Where training scripts keep a state dict; averaged weights first."""
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile and its kin put into names, wherever they wrap."""
_PREFIXES = ("module.", "model.", "encoder.", "backbone.", "network.", "net.")
"""What DataParallel, Lightning and others put in front of every name."""


def plain_names(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """A state dict out of its container and without what wrappers put before its names; and notes that say so.

    A prefix is taken off where every name has it, so that nothing is chosen among several networks. What holds no tensors
    comes back as it is.
    """
    inner = next((content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping)), content)
    tensors = {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        return content, ()
    # The number of averagings, next to the network, is torch's own (swa_utils.AveragedModel).
    names = {name: name for name in tensors if name != "n_averaged"}
    others = len(inner) - len(tensors)
    taken: list[str] = []
    for wrapper in _WRAPPERS:
        plain = {name.replace(wrapper, ""): own for name, own in names.items()}
        if len(plain) == len(names) and plain != names:
            names, taken = plain, [*taken, wrapper]
    while prefix := next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names, taken = {name.removeprefix(prefix): own for name, own in names.items()}, [*taken, prefix]
    notes = [f"{' and '.join(taken)} in its names was skipped"] if taken else []
    notes += [f"{others} entries that are no tensors were skipped"] if others else []
    return {name: tensors[own] for name, own in names.items()}, tuple(notes)


def load_entries(
    model: torch.nn.Module,
    entries: Mapping[str, torch.Tensor],
    source: str,
    *,
    format: str = "normfree",
    new_head: bool = False,
    notes: tuple[str, ...] = (),
    options: str = "the options (model.options) that the file was made with",
) -> LoadReport:
    """Copy entries (our names and layouts) into the model; one whose head has another size keeps its own.

    Args:
        options: what messages call the options of a network that the entries fit.
    Raises:
        ValueError: names or shapes differ elsewhere; up to three of them, and what to change. The model is as it was.
    """
    own = model.state_dict()
    head = {k for k in own if k.startswith("head.")}
    remade = bool(head) and (new_head or any(k not in entries or entries[k].shape != own[k].shape for k in head))
    theirs = {k: v for k, v in entries.items() if not k.startswith("head.") or (head and not remade)}
    expected = [k for k in own if k not in head or not remade]
    wrong = [k for k in expected if k not in theirs or theirs[k].shape != own[k].shape]
    wrong += [k for k in theirs if k not in own]
    if wrong:
        advice = _advice(model, own, entries, wrong, options)
        raise ValueError(f"{source} does not fit the network: {_differences(own, entries, wrong)}; {advice}")
    if any(v.is_meta for v in own.values()):
        raise ValueError("the network is on the meta device, where nothing can be loaded; give it memory with to_empty")
    odd = [k for k in expected if not torch.isfinite(theirs[k]).all()]
    if odd:
        raise ValueError(
            f"{source} holds values that are not finite, in {', '.join(odd[:3])}{' and more' if len(odd) > 3 else ''}; "
            "a network of them says nothing: give another file"
        )
    with torch.no_grad():
        for k in expected:
            own[k].copy_(theirs[k])
    if not head and any(k.startswith("head.") for k in entries):
        notes = (*notes, "the file's head is skipped, for the network has none")
    head_classes = entries["head.weight"].shape[0] if "head.weight" in entries else 0
    return LoadReport(source, format, len(expected), remade, notes, head_classes)


def _differences(own: Mapping[str, torch.Tensor], entries: Mapping[str, torch.Tensor], wrong: list[str]) -> str:
    def shape(tensors: Mapping[str, torch.Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "absent"

    shown = ", ".join(f"{k} is {shape(entries, k)} there and {shape(own, k)} here" for k in wrong[:3])
    return shown + (f", and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _advice(
    model: torch.nn.Module,
    own: Mapping[str, torch.Tensor],
    entries: Mapping[str, torch.Tensor],
    wrong: list[str],
    options: str,
) -> str:
    """What to change, from the first difference that explains the others."""
    theirs, ours = {k: v.shape for k, v in entries.items()}, {k: v.shape for k, v in own.items()}
    here, there = model.variant if isinstance(model, NFNet) else None, _families(theirs)
    channels, wanted = (shapes.get("stem.0.weight", torch.Size())[1:2] for shapes in (theirs, ours))
    if there and (here is None or here.name not in there):
        return f"the file looks like {' or '.join(there)}: create that network"
    if channels and wanted and channels != wanted:
        return f"its first convolution reads {channels[0]} channels: create the network with in_chans={channels[0]}"
    inner = "blocks.0.conv0.weight"
    if theirs.get(inner) != ours.get(inner) and here is not None and here.family == "nfnet":
        rounded = not here.rounded_bottleneck
        return f"create the network with rounded_bottleneck={rounded} (the released code rounds the first stage to 128)"
    if {k.rpartition(".")[2] for k in wrong} == {"skip_gain"}:
        gains = "skip_init=0.0" if wrong[0] in theirs else "skip_init=None"
        return f"create the network with {gains}"
    return f"create the network with {options}"


def _families(shapes: Mapping[str, torch.Size]) -> list[str]:
    """Variants with as many blocks and stem convolutions, and of the same width in the end (timm rounds it to 8)."""
    numbers = [int(found[1]) for k in shapes if (found := re.match(r"blocks\.(\d{1,4})\.", k))]
    if not numbers:
        return []
    width = shapes.get(f"blocks.{max(numbers)}.conv2.weight", torch.Size())[:1]
    stems = sum(k.startswith("stem.") and k.endswith(".weight") for k in shapes)
    return [
        name
        for name, v in VARIANTS.items()
        if sum(v.depths) == max(numbers) + 1
        and len(v.stem_widths) == stems
        and width
        and abs(width[0] - v.widths[-1]) < 8
    ]
