"""Pooled features before the head, extracted once and kept: a hundred probes cost one pass over the images.

    <sweep>/features/<digest>.npz     digest over weights, architecture, transform, data and split

The same key always means the same numbers, so a file is never rewritten, and any number of trials may race to make it.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.configuration import to_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import normalise
from pipeline.data.loading.datasets import DataConfig, EvalData
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig, build_model, load_backbone
from pipeline.storage import objects
from transfer.arrays import read_arrays
from transfer.protocol.methods import sha256
from transfer.protocol.sealed_splits import TestSplit
from transfer.protocol.tasks import Task

FEATURES = "mean over positions of forward_features, fp32"


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode and the digest of its weights."""

    model: torch.nn.Module
    digest: str


def pretrained(checkpoint_url: str, digest: str = "") -> Backbone:
    """The network of a checkpoint, on its evaluated (averaged, where there are any) weights.

    UserError where its digest is not `digest`, if one is given: it was replaced since the sweep began.
    """
    loaded = load_backbone(checkpoint_url, need_head=False)
    if digest and loaded.digest != digest:
        raise UserError(
            f"{checkpoint_url} holds other weights now (digest {loaded.digest[:12]}, then {digest[:12]}); restore the "
            "checkpoint, or run another sweep"
        )
    return Backbone(loaded.model, f"checkpoint {loaded.digest}")


def from_scratch(name: str, options: dict[str, Any], seed: int) -> Backbone:
    """The same architecture with fresh weights, a function of `seed`."""
    model, _ = build_model(ModelConfig(name=name, options=options), 2, seed=seed)
    return Backbone(model.eval(), f"weights {_weights_digest(model)}")


def _weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all tensors but the head's, which features do not see."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("head."):
            hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            hasher.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def feature_digest(weights_digest: str, augment: AugmentConfig, data_digest: str, split: str) -> str:
    """Key of the cache. Of the preprocessing only what evaluation sees counts."""
    seen = ("eval_resize", "eval_crop", "interpolation", "mean", "std")
    transform = {k: v for k, v in to_dict(augment).items() if k in seen} | {"px": augment.evaluation_px}
    return sha256([FEATURES, weights_digest, transform, data_digest, split])


def features(
    backbone: Backbone | Callable[[], Backbone],
    task: Task,
    augment: AugmentConfig,
    sweep: str,
    *,
    split: str = "",
    test: TestSplit | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, D) float32, labels (N,) int64) of a split to fit or choose on, or of the test split if it has been opened.

    Read from `<sweep>/features` if they are there, else extracted and put there.

    Args:
        split: "" = the train split. The test split is not to be named here.
    """
    made = backbone() if callable(backbone) else backbone
    split = test.name if test is not None else split or task.train_split
    if test is None and split not in (task.train_split, task.val_split):
        raise ValueError(f"{split} is no split to fit or choose on; the test split opens for a selection record")
    digest = feature_digest(made.digest, augment, task.data_digest, split)
    url = objects.join(sweep, "features", f"{digest}.npz")
    if objects.exists(url):
        kept = read_arrays(objects.read_bytes(url), url, "delete this file, the features are extracted again")
        if (
            {"features", "labels"} <= kept.keys()
            and kept["features"].ndim == 2
            and len(kept["features"]) == len(kept["labels"])
        ):
            return kept["features"], kept["labels"]
        raise UserError(f"{url} holds no features; delete this file, they are extracted again")
    found = extract(made.model, task, augment, split)
    buffer = io.BytesIO()
    np.savez(buffer, features=found[0], labels=found[1])
    objects.write_bytes(url, buffer.getvalue())
    return found


@torch.inference_mode()
def extract(
    model: torch.nn.Module, task: Task, augment: AugmentConfig, split: str, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over a split in evaluation form, in the order of its index: (N, D) float32 and (N,) int64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    data = EvalData(DataConfig(url=task.url), augment, split=split)
    parts, labels = [], []
    for batch in data.batches(batch_size):
        maps = model.forward_features(normalise(batch.images, augment, device))  # type: ignore[operator]
        parts.append(model.forward_head(maps, pre_logits=True).float().cpu().numpy())  # type: ignore[operator]
        labels.append(batch.labels.numpy())
    return np.concatenate(parts), np.concatenate(labels)
