"""Pooled features before the head, extracted once and kept: a hundred probes cost one pass over the images.

    <sweep>/features/<digest>.npz     digest over weights, architecture, transform, data and split

The same key always means the same numbers, so a file is never rewritten, and any number of trials may race to make it.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.configuration import to_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.corruptions import corrupt
from pipeline.data.augment.transforms import normalise
from pipeline.data.loading.datasets import DataConfig, EvalData
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig, build_model, load_backbone, make
from pipeline.storage import objects
from transfer.arrays import read_arrays, write_arrays
from transfer.probes.pyramid import pyramid_of
from transfer.protocol.methods import sha256
from transfer.protocol.sealed_splits import TestSplit
from transfer.protocol.tasks import Task
from transfer.protocol.truth import OWN_METHOD

FEATURES = "mean over positions of forward_features, fp32"
MAPS = "forward_features (N, h, w, D), fp16"
PYRAMID = "maps at up to three strides, the coarsest from 4 up, fp16 (transfer.probes.pyramid 1)"
MAX_MAP_BYTES = 24 << 30
"""Maps of a split are held in memory."""


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode and the digest of its weights."""

    model: torch.nn.Module
    digest: str


def pretrained(checkpoint_url: str, digest: str) -> Backbone:
    """The network of a checkpoint, on its evaluated (averaged, where there are any) weights.

    UserError where its digest is not `digest`: it was replaced since the sweep began.
    """
    loaded = load_backbone(checkpoint_url, need_head=False)
    refuse_other_weights(checkpoint_url, loaded.digest, digest)
    return Backbone(loaded.model, f"checkpoint {loaded.digest}")


def refuse_other_weights(checkpoint_url: str, now: str, then: str) -> None:
    if now != then:
        raise UserError(
            f"{checkpoint_url} holds other weights now (digest {now[:12]}, then {then[:12]}); restore the checkpoint, or run "
            "another sweep"
        )


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


def feature_digest(
    weights_digest: str,
    augment: AugmentConfig,
    data_digest: str,
    split: str,
    *,
    convert_icc: bool = True,
    what: str = FEATURES,
    corruption: tuple[str, int] | None = None,
) -> str:
    """Key of the cache. Of the preprocessing only what evaluation sees counts."""
    seen = ("eval_resize", "eval_crop", "interpolation", "mean", "std")
    transform = {k: v for k, v in to_dict(augment).items() if k in seen} | {"px": augment.evaluation_px}
    if not convert_icc:  # so that features from before this could be chosen keep their key
        transform["icc"] = "ignored"
    if corruption:
        transform["corruption"] = list(corruption)
    return sha256([what, weights_digest, transform, data_digest, split])


def features(
    backbone: Backbone,
    task: Task,
    augment: AugmentConfig,
    sweep: str,
    *,
    split: str = "",
    test: TestSplit | None = None,
    convert_icc: bool = True,
    corruption: tuple[str, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(features (N, D) float32, labels (N,) int64) of a split to fit or choose on, or of the test split if it has been opened.

    Of a task whose pixels have classes features are maps, (N, h, w, D) float16, and of one with boxes maps at several resolutions
    (`pyramid_of`), of images that are squeezed to a square.

    Read from `<sweep>/features` if they are there, else extracted and put there.

    Args:
        split: "" = the train split. The test split is not to be named here.
        convert_icc: as `data.convert_icc`.
        corruption: of every image: its name and severity (`pipeline.data.augment.corruptions`).
    """
    split = test.name if test is not None else split or task.train_split
    if test is None and split not in (task.train_split, task.val_split):
        raise ValueError(f"{split} is no split to fit or choose on; the test split opens for a selection record")
    kind = task.truth.kind
    augment = replace(augment, eval_resize="plain") if kind in OWN_METHOD else augment
    what = {"pixels": MAPS, "boxes": PYRAMID}.get(kind, FEATURES)
    how: dict[str, Any] = {"convert_icc": convert_icc, "corruption": corruption}
    digest = feature_digest(backbone.digest, augment, task.data_digest, split, what=what, **how)
    url = objects.join(sweep, "features", f"{digest}.npz")
    if objects.exists(url):
        kept = read_arrays(url, "delete this file, the features are extracted again")
        if (
            {"features", "labels"} <= kept.keys()
            and kept["features"].ndim == {"pixels": 4, "boxes": 1}.get(kind, 2)
            and len(kept["features"]) == len(kept["labels"])
        ):
            return kept["features"], kept["labels"]
        raise UserError(f"{url} holds no features; delete this file, they are extracted again")
    found = extract(backbone.model, task, augment, split, **how)
    write_arrays(url, features=found[0], labels=found[1])
    return found


@torch.inference_mode()
def extract(
    model: torch.nn.Module,
    task: Task,
    augment: AugmentConfig,
    split: str,
    batch_size: int = 64,
    *,
    convert_icc: bool = True,
    corruption: tuple[str, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over a split in evaluation form, in the order of its index: (N, D) float32 and (N,) int64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    change = partial(corrupt, *corruption) if corruption else None
    data = EvalData(DataConfig(url=task.url, convert_icc=convert_icc), augment, split=split, change=change)
    parts, labels = [], []
    for batch in data.batches(batch_size):
        images = normalise(batch.images, augment, device)
        if task.truth.kind in OWN_METHOD:
            parts.append(pyramid_of(model, images) if task.truth.kind == "boxes" else _maps(model, images))
            if parts[0].nbytes / len(parts[0]) * data.num_samples > MAX_MAP_BYTES:
                raise UserError(
                    f"the maps of {data.num_samples:,} images take more than {MAX_MAP_BYTES >> 30} GiB; set a smaller image_px"
                )
        else:
            maps = model.forward_features(images)  # type: ignore[operator]
            parts.append(model.forward_head(maps, pre_logits=True).float().cpu().numpy())  # type: ignore[operator]
        labels.append(batch.labels.numpy())
    return np.concatenate(parts), np.concatenate(labels)


def _maps(model: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    found = model.forward_features(images)  # type: ignore[operator]
    return positions(found, int(model.num_features)).half().cpu().numpy()  # type: ignore[arg-type]


def positions(found: torch.Tensor, width: int) -> torch.Tensor:
    """What `forward_features` gave, as maps (N, h, w, D). UserError where it has no positions in rows and columns."""
    if found.dim() == 4 and found.shape[1] == width:
        return found.permute(0, 2, 3, 1)
    if found.dim() == 4 and found.shape[-1] == width:  # as Swin has it
        return found
    raise UserError(
        f"its features of shape {tuple(found.shape[1:])} have no rows and columns, which segmentation needs"
    )


def map_bytes(name: str, options: dict[str, Any], px: int) -> int:
    """Of an image's maps, before the network has weights. UserError where it has none."""
    with torch.device("meta"):
        model = make(name, 2, options).eval()
    try:
        found = model.forward_features(torch.zeros(1, 3, px, px, device="meta"))  # type: ignore[operator]
        return 2 * positions(found, int(model.num_features)).numel()  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(
            f"{name} cannot segment: {error}; take a convolutional network or Swin, or leave segment out"
        ) from None
