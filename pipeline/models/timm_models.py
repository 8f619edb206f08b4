"""timm's networks under our loop: the same three things that the loop asks of ours, whatever timm calls them.

A name is `timm:NAME`, NAME as timm knows it, tag included (`timm:convnext_base.fb_in22k`). The trunk is timm's without its
classifier; the head is a linear layer of ours called `head`, so rules by name (no AGC on the classifier, a new head for new
classes) hold for every network. timm is optional, and is imported when such a name is used.
"""

import ast
import difflib
import hashlib
import inspect
import warnings
from typing import Any

import torch
from torch import nn

from nfnet.functional import outside_autocast
from nfnet.weights.files import check_file
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError

PREFIX = "timm:"
HEAD_STD = 0.01
_THEIR_OPTION = {"stochastic_depth": "drop_path_rate"}
"""Our name of an option -> timm's."""


class PeerNetwork(nn.Module):
    """A trunk of timm's and a linear head: images (N, 3, H, W) -> logits (N, num_classes)."""

    def __init__(
        self, trunk: nn.Module, num_classes: int, *, head_init: str = "normal", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.trunk = trunk
        width: Any = getattr(trunk, "head_hidden_size", None) or trunk.num_features
        self.num_features = int(width)
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes)
        if head_init == "zero":
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> what timm's trunk gives before pooling: maps or tokens."""
        found: torch.Tensor = self.trunk.forward_features(x)  # type: ignore[operator]
        return found

    def forward_intermediates(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(N, 3, H, W) -> the maps (N, C, h, w) of timm's trunk, in order. AttributeError where timm gives none."""
        return list(self.trunk.forward_intermediates(x, intermediates_only=True))  # type: ignore[operator]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Maps or tokens -> pooled features (N, num_features), normalised where timm's head does, or fp32 logits."""
        pooled: torch.Tensor = self.trunk.forward_head(x)  # type: ignore[operator]
        if pre_logits:
            return pooled
        return outside_autocast(self.head, self.dropout(pooled))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def no_weight_decay(self) -> set[str]:
        """What timm does not decay besides gains and biases: embeddings of positions, and the like."""
        names = self.trunk.no_weight_decay() if hasattr(self.trunk, "no_weight_decay") else ()  # type: ignore[operator]
        return {f"trunk.{name}" for name in names}

    def layer_numbers(self) -> dict[str, int]:
        """Parameter -> its layer as timm counts them, the head last. UserError where timm does not say."""
        from timm.models import group_parameters

        if not hasattr(self.trunk, "group_matcher"):
            raise UserError("timm does not say which layers this network has; set optim.layer_decay to 1")
        found = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        last = max(found.values()) + 1
        return {f"trunk.{n}": i for n, i in found.items()} | {
            n: last for n, _ in self.named_parameters() if n.startswith("head.")
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)  # type: ignore[operator]


def is_timm(name: str) -> bool:
    return name.startswith(PREFIX)


def value_of(option: Any) -> Any:
    """An option as timm's functions want it: numbers, truth values, None and lists out of text; other text as it is."""
    if not isinstance(option, str):
        return option
    try:
        return ast.literal_eval(
            {"true": "True", "false": "False", "none": "None", "null": "None"}.get(option.lower(), option)
        )
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return option


def make(name: str, num_classes: int, options: dict[str, Any]) -> PeerNetwork:
    """`timm:NAME` with fresh weights.

    Args:
        options: drop_rate (before the head), head_init ("normal": N(0, 0.01^2), or "zero"), stochastic_depth, and any keyword
            argument of timm's own model, such as img_size.
    Raises:
        UserError: timm is not installed, has no such model, or refuses an option.
    """
    own = {k: options[k] for k in ("head_init", "drop_rate") if k in options}
    theirs = {_THEIR_OPTION.get(k, k): v for k, v in options.items() if k not in own}
    if wrong := sorted(
        theirs.keys() & _of_the_factory()
    ):  # files and addresses among them; options come with checkpoints
        raise UserError(f"{name}: {wrong[0]} is no option of a network; weights are named by model.init_from")
    return PeerNetwork(_create(name, num_classes=0, **theirs), num_classes, **own)


def _of_the_factory() -> frozenset[str]:
    """Names of what timm's makers of networks take for themselves: where weights come from, and how."""
    try:
        from timm.models import build_model_with_cfg, create_model
    except ImportError:
        return frozenset()
    makers = (inspect.signature(maker).parameters.values() for maker in (create_model, build_model_with_cfg))
    return frozenset(
        {"num_classes"}.union(*({one.name for one in maker if one.kind is not one.VAR_KEYWORD} for maker in makers))
    )


def load(name: str, file: str | None) -> tuple[dict[str, torch.Tensor], int, str]:
    """Weights of a timm model: (by the names of `PeerNetwork`, number of classes of its head, SHA-256 of all of them).

    Args:
        file: a local file as timm saves or releases it (safetensors, or torch's with nothing but weights in it); None: the
            weights that timm has for that name, which it downloads and keeps in its own cache.
    Raises:
        UserError: the file is not there, holds more than weights or another network, or timm cannot get its own.
    """
    overlay: dict[str, Any] = {}
    kwargs: dict[str, Any] = {}
    if file is not None:
        num_classes = _classes_in(name, file)
        overlay, kwargs = {"file": file, "num_classes": num_classes}, {"num_classes": num_classes}
    whole = _create(name, pretrained=True, pretrained_cfg_overlay=overlay or None, **kwargs)
    classifier = whole.get_classifier()  # type: ignore[operator]
    weights: dict[str, torch.Tensor] = {}
    num_classes = 0
    if isinstance(classifier, nn.Linear | nn.Conv2d):
        matrix = classifier.weight.detach().flatten(1)
        num_classes = len(matrix)
        weights["head.weight"] = matrix
        weights["head.bias"] = torch.zeros(num_classes) if classifier.bias is None else classifier.bias.detach()
    whole.reset_classifier(0)  # type: ignore[operator]
    weights |= {f"trunk.{k}": v.detach() for k, v in whole.state_dict().items()}
    odd = next((key for key, tensor in weights.items() if not torch.isfinite(tensor).all()), None)
    if odd is not None:
        raise UserError(f"{file or name} holds values that are not finite, in {odd}; give another file")
    hasher = hashlib.sha256()
    for key, tensor in sorted(weights.items()):
        hasher.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(tensor.contiguous().numpy().tobytes())
    return weights, num_classes, hasher.hexdigest()


def as_timm(name: str, network: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """timm's own network, classifier included, with the weights of a `PeerNetwork`; and the arguments that timm makes it with.

    Raises:
        UserError: timm's classifier is no linear map of the pooled features, or holds more than ours has.
    """
    theirs = {_THEIR_OPTION.get(k, k): v for k, v in options.items() if k not in ("head_init", "drop_rate")}
    head: Any = network.get_submodule("head")
    whole = _create(name, num_classes=head.out_features, **theirs)
    classifier = whole.get_classifier()  # type: ignore[operator]
    place = next((n for n, m in whole.named_modules() if m is classifier), None)
    if place is None or not isinstance(classifier, nn.Linear | nn.Conv2d) or classifier.bias is None:
        raise UserError(f"the classifier of timm's {name} is not one linear map with a bias; take --format safetensors")
    state = network.get_submodule("trunk").state_dict()
    state |= {f"{place}.weight": head.weight.view_as(classifier.weight), f"{place}.bias": head.bias}
    differing = sorted(set(state) ^ set(whole.state_dict()))
    if differing:
        raise UserError(
            f"timm's {name} with a classifier differs from its trunk in {differing[0]}; take --format safetensors"
        )
    whole.load_state_dict(state)
    return whole.eval(), theirs


def imagenet_names() -> list[str]:
    """WordNet's names of the 1,000 classes in the order of published heads, as timm lists them; [] where it is not installed."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return []
    names: list[str] = ImageNetInfo().label_names()
    return names


def architecture(name: str) -> str:
    """timm's name of the network, without the tag of its weights."""
    return name.removeprefix(PREFIX).partition(".")[0]


def preprocessing(name: str) -> AugmentConfig:
    """Size, resizing and normalisation that timm states for the weights of that name."""
    from timm.data import resolve_data_config

    with torch.device("meta"):
        model = _create(name, num_classes=0)
    found = resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    interpolation = {"random": "bicubic"}.get(found["interpolation"], found["interpolation"])
    if interpolation not in ("bicubic", "bilinear"):
        raise UserError(
            f"{name} wants images resized by {interpolation}, which this pipeline does not do; choose another"
        )
    square = found["crop_mode"] == "squash"
    return AugmentConfig(
        image_px=int(found["input_size"][-1]),
        eval_resize="square" if square else "aspect",
        eval_crop=float(found["crop_pct"]),
        interpolation=interpolation,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
    )


def _create(name: str, **kwargs: Any) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError(f"{name} needs timm, which is not installed; pip install timm") from None
    refuse_place(name)
    model = name.removeprefix(PREFIX)
    if not timm.is_model(architecture(name)):
        near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.4)
        raise UserError(f"timm has no model {model!r}; the nearest names are {', '.join(near) or 'none'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            created: nn.Module = timm.create_model(model, **kwargs)
    except Exception as error:  # a download, a file, an option: each fails in ways of its own
        first = (str(error).splitlines() or [""])[0]
        what = "its weights could not be loaded" if kwargs.get("pretrained") else "timm refused it"
        advice = "; give a local file as timm:NAME@FILE" if what.startswith("its") else "; change model.options"
        raise UserError(f"{name}: {what} ({type(error).__name__}: {first}){advice}") from None
    return created


def refuse_place(name: str) -> None:
    """UserError for timm's names of places (`hf-hub:ORG/NAME`, `local-dir:DIR`): a configuration and weights of anybody, under no
    digest, which timm would fetch and build by itself."""
    source, is_place, place = name.removeprefix(PREFIX).partition(":")
    if not is_place:
        return
    repository = place.partition("@")[0]
    if source in ("hf-hub", "hf_hub") and repository.startswith("timm/"):
        advice = f"write {PREFIX}{repository.removeprefix('timm/')}, by which timm knows these weights"
    elif source in ("hf-hub", "hf_hub"):
        fetch = f"hf download {repository} model.safetensors"
        advice = f"fetch its file ({fetch}) and give network and file, {PREFIX}NAME@model.safetensors"
    else:
        advice = f"give network and file, {PREFIX}NAME@{repository or 'DIR'}/model.safetensors"
    raise UserError(f"{name} is a place, not a network, and what lies there may change; {advice}")


def _classes_in(name: str, file: str) -> int:
    """Classes of the head in a file, 0 where it has none."""
    import pickle

    from timm.models import load_state_dict

    try:
        check_file(file)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}; give timm:NAME@FILE with a file of weights") from None
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    try:
        if file.endswith(".npz"):  # arrays as Google releases them, which timm reads by itself
            return int(_create(name).num_classes)  # type: ignore[arg-type]
        state = load_state_dict(file, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} is refused, nothing of it was run: it holds more than weights; save its state dict alone, best as "
            "safetensors, where it was made"
        ) from None
    except Exception as error:
        raise UserError(f"{file} is no file of weights ({type(error).__name__}); fetch it again") from None
    with torch.device("meta"):
        place = _create(name).pretrained_cfg["classifier"]  # type: ignore[index]
    first = place if isinstance(place, str) else place[0]
    weight = state.get(f"{first}.weight")
    return 0 if weight is None else int(weight.shape[0])
