"""The network of a run: made by name, with fresh weights or those of a checkpoint or a file of another house.

MODEL of a run              nfnet_f0, nf_resnet50, ...; timm:NAME for any of timm's (`pipeline.models.timm_models`);
                            trunk:NAME with any method of normalisation (`pipeline.models.trunks`)
where weights come from     a run folder or checkpoint, path or URL
                            NAME@FILE        one of our networks and a file that `nfnet.load_published` reads (DeepMind's, timm's)
                            FILE.safetensors what `nfnet.save_weights` wrote
                            timm:NAME[@FILE] timm's network, with timm's own weights, or those of a local file
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

import nfnet
from nfnet.block import Conventions
from nfnet.layers import GAMMA
from nfnet.model import NFNet
from nfnet.variants import adjust, get_variant
from nfnet.weights.state_dict import load_entries
from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import load
from pipeline.checkpoint.load import WhichWeights
from pipeline.configuration import check_fields, convert, from_dict, hints, nearest
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError
from pipeline.field_types import Count, ShareBelowOne, Text
from pipeline.models import timm_models, trunks
from pipeline.models.batch_norm import Statistics, set_statistics
from pipeline.models.weight_files import Origin, of_file, of_timm


def _option_types() -> dict[str, Any]:
    declared = {**hints(NFNet.__init__), **hints(Conventions), **hints(adjust)}
    narrower: dict[str, Any] = {
        "in_chans": Count,
        "activation": Literal[*sorted(GAMMA)] | None,
        "se_activation": Literal[*sorted(GAMMA)],
        "drop_rate": ShareBelowOne,
        "stochastic_depth": ShareBelowOne,
        "head_init": Literal["normal", "zero"] | None,
        "padding": Literal["same", "symmetric"],
        "width_divisor": Count,
        "widths": tuple[Count, ...] | None,
    }
    names = nfnet.OPTIONS + nfnet.CONVENTIONS + nfnet.VARIANT_OPTIONS
    return {name: narrower.get(name, declared[name]) for name in names}


OPTION_TYPES = _option_types()
"""Of `nfnet.create_model`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: Text
    """One of `nfnet.list_models()`, or timm:NAME, or trunk:NAME."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `nfnet.create_model`: drop_rate, stochastic_depth, activation, ...; of timm's model for timm:NAME."""
    init_from: str | None = None
    """A checkpoint, run folder or file (see this module) whose weights the run starts from; a head of another size is made
    anew."""
    init_weights: WhichWeights = "evaluated"
    """evaluated: the averaged weights if that run kept them, else the raw ones."""
    batch_norm: Statistics = "local"
    """What batch normalisation uses in training: each rank's micro-batch (local), those of all ranks (synchronised), or its
    running statistics, which then stay as they are (frozen)."""
    new_head: bool = False
    """Make the head anew even if the checkpoint's has the right size: its classes are those of another task."""

    def __post_init__(self) -> None:
        check_fields(self, "model")
        object.__setattr__(self, "options", typed_options(self.name, self.options))


@dataclass(frozen=True)
class LoadedBackbone:
    model: nn.Module
    config: dict[str, Any]
    """The resolved configuration of the run that made the checkpoint; of a file `model` and nothing more."""
    digest: str
    """As `Origin.digest`."""
    url: str
    classes: list[str]
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Preprocessing that the weights were trained with."""

    @property
    def convert_icc(self) -> bool:
        """As `data.convert_icc` of the run that made it."""
        return bool(self.config.get("data", {}).get("convert_icc", True))


def typed_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a network with the types that it takes, from text too. UserError for those that it does not have."""
    if timm_models.is_timm(name):
        return {key: timm_models.value_of(value) for key, value in options.items()}
    if trunks.is_trunk(name):
        return trunks.typed_options(options)
    for key in options:
        if key not in OPTION_TYPES:
            raise UserError(f"model.options has no {key!r}; {nearest(key, OPTION_TYPES)}")
    return {key: convert(OPTION_TYPES[key], value, f"model.options.{key}") for key, value in options.items()}


def make(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """UserError for a name or an option that there is not, and for sizes that no tensor has."""
    if timm_models.is_timm(name) and "@" in name:
        raise UserError(f"model.name is {name}; name the network alone, and set model.init_from to {name}")
    try:
        if timm_models.is_timm(name):
            return timm_models.make(name, num_classes, options)
        if trunks.is_trunk(name):
            return trunks.make(name, num_classes, options)
        return nfnet.create_model(name, num_classes=num_classes, **options)
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"model {name}: {(str(error).splitlines() or [''])[0]}") from None


@contextlib.contextmanager
def without_memory(max_modules: int, where: str) -> Iterator[None]:
    """Networks that are built in here have no values. UserError, with `where` the options stand, at the first module above
    `max_modules`: options of somebody else's may ask for any number of layers."""
    num_modules = itertools.count(1)

    def count(*_: object) -> None:
        if next(num_modules) > max_modules:
            raise UserError(
                f"{where} asks for a network of more than {max_modules:,} modules and holds fewer weights; use another checkpoint"
            )

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            yield
    finally:
        hook.remove()


def build_model(config: ModelConfig, num_classes: int, *, seed: int) -> tuple[nn.Module, str]:
    """The network on the CPU, to be trained, and one sentence about where its weights come from.

    Initial weights depend on `seed` alone; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config.name, num_classes, config.options)
    if config.init_from is None:
        return set_statistics(model, config.batch_norm), f"fresh weights from seed {seed}"
    weights, origin = load_origin(config.init_from, config.init_weights, like=model)
    if not _same(origin.model, config.name):
        raise UserError(
            f"{origin.url} holds a {origin.model}, the run asks for a {config.name}; set model.name to {origin.model}"
        )
    remade = _load(model, weights, origin.url, new_head=config.new_head)
    head = "its head is made anew" if remade else "head included"
    return set_statistics(model, config.batch_norm), f"weights of {origin.url} ({head})"


def load_backbone(url: str, weights: WhichWeights = "evaluated", *, need_head: bool = True) -> LoadedBackbone:
    """The network of a checkpoint (or of the newest one in a run folder, or of a file) with its own head, in evaluation mode.

    Args:
        need_head: refuse weights without a head of their own classes, as a probe of features need not.
    """
    tensors, origin = load_origin(url, weights)
    num_classes = len(origin.classes) or 1000
    if spelled(url) is None:  # a commit file's word for how large the network is, before memory is taken for it
        with without_memory(1000 + 20 * len(tensors), origin.url):
            claimed = sum(
                value.numel() for value in make(origin.model, num_classes, origin.options).state_dict().values()
            )
        if claimed > 2 * sum(tensor.numel() for tensor in tensors.values()):
            raise UserError(f"{origin.url} holds fewer weights than its {origin.model} has; use another checkpoint")
    with torch.random.fork_rng(devices=[]):
        model = make(origin.model, num_classes, origin.options)
    if _load(model, tensors, origin.url) and need_head:
        raise UserError(
            f"{origin.url} lacks the head of its own {len(origin.classes)} classes; give another checkpoint"
        )
    return LoadedBackbone(model.eval(), origin.config, origin.digest, origin.url, origin.classes, origin.augment)


def find_origin(url: str) -> Origin:
    """What is known of the weights at `url`, every byte of a checkpoint verified. UserError if there are none."""
    if spelled(url) is not None:
        return load_origin(url)[1]
    cache = load.default_cache()
    commit = load.resolve(url, cache)
    load.verify(commit, cache)
    return _of_commit(commit)


def load_origin(
    url: str, weights: WhichWeights = "evaluated", *, like: nn.Module | None = None
) -> tuple[dict[str, torch.Tensor], Origin]:
    """Weights by parameter name, and where they come from.

    Args:
        like: a network of the same make, whose options a file that does not state its own is read with.
    """
    place = spelled(url)
    if place is None:
        tensors, commit = load.load_weights(url, weights)
        return tensors, _of_commit(commit)
    name, file = place
    if timm_models.is_timm(name):
        return of_timm(url, name, file)
    assert file is not None
    return of_file(url, name, file, like)


def spelled(url: str) -> tuple[str, str | None] | None:
    """(model or "", file or None) of NAME@FILE, timm:NAME[@FILE] and FILE.safetensors; None for a place of checkpoints."""
    name, at, file = url.partition("@")
    if timm_models.is_timm(url):
        return name, file if at else None
    if at and file and _is_ours(name):
        return name, file
    if url.endswith(".safetensors"):
        return "", url
    return None


def absolute(url: str) -> str:
    """The same place, from any working directory."""
    place = spelled(url)
    if place is not None:
        name, file = place
        return url if file is None else f"{name}@{_absolute(file)}".removeprefix("@")
    return _absolute(url)


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def _is_ours(name: str) -> bool:
    try:
        get_variant(name)
    except ValueError:
        return False
    return True


def _same(one: str, other: str) -> bool:
    """Whether two names mean one network: ours have aliases."""
    if _is_ours(one) and _is_ours(other):
        return get_variant(one).name == get_variant(other).name
    return one.partition(".")[0] == other.partition(".")[0] if timm_models.is_timm(one) else one == other


def _load(model: nn.Module, weights: dict[str, torch.Tensor], url: str, *, new_head: bool = False) -> bool:
    """Load by name; True if the head keeps its fresh weights: asked for, or of another size."""
    try:
        return load_entries(model, weights, url, new_head=new_head).head_remade
    except ValueError as error:
        raise UserError(str(error)) from None


def _of_commit(commit: checkpoint.Commit) -> Origin:
    """Raises UserError where the configuration in the commit file, which anybody may have written, is none."""
    where = f"the configuration in {commit.url}"
    for part in ("model", "augment"):
        if not isinstance(commit.config.get(part), dict):
            raise UserError(f"{where} has no {part}; use another checkpoint")
    model = from_dict(ModelConfig, commit.config["model"], f"{where}: model")
    place = commit.url.rstrip("/").split("/")
    return Origin(
        url=commit.url,
        digest=commit.digest,
        label=f"{commit.config.get('name', model.name)}, step {commit.step}" if len(place) > 1 else commit.url,
        model=model.name,
        options=typed_options(model.name, model.options),
        augment=from_dict(AugmentConfig, commit.config["augment"], f"{where}: augment"),
        config=commit.config,
        classes=commit.classes,
    )
