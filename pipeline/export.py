"""A checkpoint in a form that others read: safetensors, timm, ONNX (and MLflow, `orchestration.export_mlflow`).

A writer fills a temporary folder and hands back how to compute logits from what it wrote. Those are compared with the
checkpoint's own on a fixed batch before anything appears at `out`: a wrong export is never left behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import nfnet
from nfnet.model import NFNet
from pipeline import checkpoint, exported, storage
from pipeline.backbone import load_backbone
from pipeline.checkpoint import Commit
from pipeline.config import from_dict
from pipeline.data.augment import AugmentConfig, eval_image, normalise
from pipeline.data.decode import decode_image
from pipeline.errors import UserError
from pipeline.exported import Exported
from pipeline.model_card import model_card

WhichWeights = Literal["evaluated", "ema", "raw"]
TOLERANCE = 1e-4
"""Of the largest logit. Between two programs in fp32 the sums' order differs; measured are 1e-6 and below."""
PROBE_IMAGES = 4


@dataclass(frozen=True)
class Probe:
    """The fixed batch: images of noise, the same every time, as files and as the network's input."""

    files: list[bytes]
    images: torch.Tensor
    """(N, 3, px, px) float32, normalised."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that is exported."""

    model: NFNet
    commit: Commit
    weights: str
    """ema or raw."""
    augment: AugmentConfig

    @property
    def px(self) -> int:
        return self.augment.evaluation_px

    def probe(self) -> Probe:
        # Larger than the input and not square, so that resizing is part of what is compared.
        shape = (PROBE_IMAGES, self.px + self.px // 2, self.px + self.px // 3, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        files = []
        for pixels in noise:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            files.append(buffer.getvalue())
        pixels = np.stack([eval_image(decode_image(file), self.augment) for file in files])
        return Probe(files, normalise(torch.from_numpy(pixels), self.augment, torch.device("cpu")))

    def description(self) -> dict[str, Any]:
        """What a stranger needs to use the weights, and what leads back to where they come from."""
        commit = self.commit
        model = commit.config["model"]
        return {
            "model": {
                "name": model["name"],
                "options": model["options"],
                "num_classes": len(commit.classes),
                "library": "normfree (nfnet.create_model)",
            },
            "classes": commit.classes,
            "preprocessing": exported.preprocessing(self.augment),
            "weights": self.weights,
            "source": {
                "url": commit.url,
                "digest": commit.digest,
                "step": commit.step,
                "samples": commit.samples,
                "num_updates": commit.num_updates,
                "config_digest": commit.config_digest,
                "dataset": commit.dataset,
                "evaluation": commit.evaluation,
            },
        }


Answer = Callable[[Probe], torch.Tensor]
"""Logits (N, classes) computed from the written files alone."""
Writer = Callable[[Source, Path], Answer]
"""Writes into a folder that does not exist yet."""


def open_source(url: str, weights: WhichWeights = "evaluated") -> Source:
    """The checkpoint (a run folder: its newest one; an exported folder too) with its own head, on the CPU."""
    loaded = load_backbone(url, weights)
    if not isinstance(loaded.model, NFNet):
        raise UserError(f"{url} is no network of normfree's; only those are exported")
    commit = checkpoint.resolve(loaded.url, checkpoint.default_cache())
    kept = "ema" if "ema" in commit.kinds else "raw"
    which = kept if weights == "evaluated" else weights
    augment: AugmentConfig = from_dict(AugmentConfig, commit.config["augment"], "augment")
    return Source(loaded.model, commit, which, augment)


def write_safetensors(source: Source, folder: Path) -> Answer:
    folder.mkdir()
    path = folder / exported.WEIGHTS
    nfnet.save_weights(source.model, path)
    return lambda probe: nfnet.load_model(path)(probe.images)


def _write_timm(source: Source, folder: Path) -> Answer:
    from pipeline.export_timm import write_timm

    return write_timm(source, folder)


def _write_onnx(source: Source, folder: Path) -> Answer:
    from pipeline.export_onnx import write_onnx

    return write_onnx(source, folder)


WRITERS: dict[str, Writer] = {"safetensors": write_safetensors, "timm": _write_timm, "onnx": _write_onnx}


def export(
    checkpoint_url: str,
    format: str,
    out: str,
    *,
    weights: WhichWeights = "evaluated",
    tolerance: float = TOLERANCE,
    writers: Mapping[str, Writer] = WRITERS,
) -> Exported:
    """Write the checkpoint to `out`, a new folder at any URL; compared with the checkpoint first, whole or not at all.

    Args:
        weights: evaluated: the averaged ones where they were kept, else the raw ones.
        tolerance: largest difference of logits on the fixed batch, as a share of the largest logit. 0 for safetensors
            whatever is given: they are the same numbers.
    Raises:
        UserError: no checkpoint, `out` is not empty, the format cannot express the network, or the logits differ.
    """
    if format not in writers:
        raise UserError(f"--format is {format!r}; choose one of {', '.join(writers)}")
    if not tolerance >= 0:
        raise UserError(f"--tolerance is {tolerance}; set a share of the largest logit, such as {TOLERANCE:g}")
    tolerance = 0.0 if format == "safetensors" else tolerance
    _refuse_taken(out)
    source = open_source(checkpoint_url, weights)
    with _staged(out) as folder:
        difference = _compare(source, writers[format](source, folder), format, tolerance)
        check = {"images": PROBE_IMAGES, "difference": difference, "tolerance": tolerance}
        description = {"kind": format, **source.description(), "check": check}
        card = model_card(source.model, source.commit, description)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = _listed(folder)
        shapes = {name: list(t.shape) for name, t in source.model.state_dict().items()}
        digest = exported.write(
            str(folder), {**description, "files": files, "shapes": shapes, "run": source.commit.config}
        )
        _publish(folder, out, [f["name"] for f in files])
    return Exported(
        url=out,
        kind=format,
        weights=source.weights,
        digest=digest,
        source_url=source.commit.url,
        source_digest=source.commit.digest,
        classes=source.commit.classes,
        files=files,
        difference=difference,
        tolerance=tolerance,
    )


@torch.no_grad()
def _compare(source: Source, answer: Answer, format: str, tolerance: float) -> float:
    probe = source.probe()
    expected, found = source.model(probe.images), answer(probe)
    scale = float(expected.abs().max())
    if not torch.isfinite(expected).all() or float((expected - expected.mean(0)).abs().max()) == 0:
        raise UserError(
            f"{source.commit.url} gives no finite logits, or the same ones for every image, so an export of it cannot be "
            "checked; give a checkpoint that was trained"
        )
    if found.shape != expected.shape:
        raise UserError(
            f"the export to {format} gives logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
    difference = float((found - expected).abs().max()) / scale
    if not difference <= tolerance:
        raise UserError(
            f"the export to {format} was not kept: its logits differ from the checkpoint's by {difference:.1e} of the largest, "
            f"allowed are {tolerance:g}{_why(source, format)}; --tolerance sets how much is acceptable"
        )
    return difference


def _why(source: Source, format: str) -> str:
    if format != "timm":
        return ""
    from nfnet.timm_arguments import timm_form

    return "".join(f" ({reason})" for reason in timm_form(source.model).approximations)


def _refuse_taken(out: str) -> None:
    if storage.is_local(out):
        path = storage.local_path(out)
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    else:
        taken = bool(storage.list_urls(out)) or storage.exists(out)
    if taken:
        raise UserError(f"{out} is not empty; set --out to a new folder, or remove what is there")


@contextlib.contextmanager
def _staged(out: str) -> Iterator[Path]:
    """A folder to be filled, on the disk of a local `out`; removed afterwards unless it was moved there."""
    parent = None
    if storage.is_local(out):
        parent = storage.local_path(out).absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=storage.TEMP_PREFIX) as temporary:
        yield Path(temporary) / "export"


def _listed(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [
        {"name": p.relative_to(folder).as_posix(), "size_bytes": p.stat().st_size, "sha256": storage.sha256_file(p)}
        for p in paths
    ]


def _publish(folder: Path, out: str, names: list[str]) -> None:
    """`export.json` comes last; a store that fails on the way is left empty as it was."""
    if storage.is_local(out):
        os.replace(folder, storage.local_path(out).absolute())
        return
    try:
        for name in [*names, exported.NAME]:
            storage.put_file(folder / name, storage.join(out, name))
    except BaseException:
        with contextlib.suppress(Exception):
            storage.remove_tree(out)
        raise
