"""Weights out of files and of timm: tensors by our names, and what is known of them (`pipeline.models.backbone`)."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import nfnet
from nfnet.variants import get_variant
from nfnet.weights.state_dict import LoadReport
from pipeline.checkpoint import load
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError
from pipeline.models import timm_models
from pipeline.storage import objects


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Weights to start from, and what is known of them before a network is made of them."""

    url: str
    """As it may be given again, from any working directory; of a run folder the checkpoint that was newest."""
    digest: str
    """SHA-256 of the checkpoint's commit file, of the file, or of timm's tensors."""
    label: str
    """For people."""
    model: str
    options: dict[str, Any]
    augment: AugmentConfig
    """Preprocessing that the weights were trained with."""
    config: dict[str, Any]
    """The resolved configuration of the run that made it; of a file `model` and nothing more."""
    classes: list[str]
    """Names of the head's classes, numbers where nobody says; empty where there is no head."""


def of_timm(url: str, name: str, file: str | None) -> tuple[dict[str, torch.Tensor], Origin]:
    timm_models.refuse_place(name)
    tensors, num_classes, digest = timm_models.load(name, None if file is None else _local(file))
    origin = Origin(
        url=url,
        digest=digest,
        label=name if file is None else f"{name} ({os.path.basename(file)})",
        model=name,
        options={},
        augment=timm_models.preprocessing(name),
        config={"model": {"name": name, "options": {}}},
        classes=[str(i) for i in range(num_classes)],
    )
    return tensors, origin


def of_file(url: str, name: str, file: str, like: nn.Module | None) -> tuple[dict[str, torch.Tensor], Origin]:
    path = _local(file)
    options: dict[str, Any] = dict(getattr(like, "options", None) or {})
    num_classes = 1000
    if not name or path.endswith(".safetensors"):
        try:
            name, num_classes, options = nfnet.read_description(path)
        except ValueError as error:
            if not name:
                raise UserError(str(error)) from None
    variant = get_variant(name)
    try:
        model, report = _read_file(path, name, num_classes, options)
        if report.head_remade and report.head_classes:  # the file's own head, of other classes than ImageNet's
            num_classes = report.head_classes
            model, report = _read_file(path, name, num_classes, options)
    except ValueError as error:
        raise UserError(_advice_on_timm(path, name, file, options) or str(error)) from None
    tensors = {k: v for k, v in model.state_dict().items() if not (report.head_remade and k.startswith("head."))}
    shaping = {k: v for k, v in options.items() if k not in ("drop_rate", "stochastic_depth", "head_init")}
    origin = Origin(
        url=url,
        digest=objects.sha256_file(path),
        label=f"{variant.name} ({os.path.basename(file)})",
        model=variant.name,
        options=shaping,
        augment=AugmentConfig(
            image_px=variant.train_px,
            eval_px=variant.test_px,
            eval_resize="published" if variant.test_px > 100 else "plain",
        ),
        config={"model": {"name": variant.name, "options": shaping}},
        classes=[] if report.head_remade else [str(i) for i in range(num_classes)],
    )
    return tensors, origin


def _read_file(path: str, name: str, num_classes: int, options: dict[str, Any]) -> tuple[nn.Module, LoadReport]:
    with torch.random.fork_rng(devices=[]):
        model = nfnet.create_model(name, num_classes=num_classes, **options)
    return model, nfnet.load_published(model, path)


def _advice_on_timm(path: str, name: str, file: str, options: dict[str, Any]) -> str:
    """What to ask for where the file fits timm's network of that name, which differs from the published one; else ""."""
    theirs = nfnet.timm_options(name)
    try:
        _read_file(path, name, 1000, {**options, **theirs})
    except ValueError:
        return ""
    words = " ".join(f"--model.options.{key} {str(value).lower()}" for key, value in theirs.items())
    return (
        f"{file} holds timm's {name}, which is another network than the published one: give timm:{name}@{file}, or make the "
        f"network with timm's options (in a run: {words})"
    )


def _local(file: str) -> str:
    """A file's path on this machine; from an object store it is fetched once."""
    if objects.is_local(file):
        path = objects.local_path(file)
        if not path.is_file():
            raise UserError(f"there is no file {file}; give the path of a file of weights after the @")
        return str(path)
    name = hashlib.sha256(f"{file} {objects.size_bytes(file)}".encode()).hexdigest()[:16]
    path = os.path.join(load.default_cache(), "files", name, os.path.basename(file))  # type: ignore[assignment]
    if not os.path.exists(path):
        objects.download(file, path)
    return str(path)
