"""A checkpoint in a form that others read: safetensors, timm, ONNX (and MLflow, `orchestration.registry.export_mlflow`).

A writer fills a temporary folder and hands back how to compute logits from what it wrote. Those are compared with the
checkpoint's own on a fixed batch before anything appears at `out`: a wrong export is never left behind.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import nfnet
from nfnet.weights.files import load_tensors, save_tensors
from pipeline.checkpoint import exported
from pipeline.checkpoint.commit import FileInfo
from pipeline.checkpoint.exported import Exported
from pipeline.checkpoint.load import WhichWeights
from pipeline.errors import UserError
from pipeline.export.card_facts import CardFacts
from pipeline.export.model_card import NO_FACTS, model_card
from pipeline.export.source import (
    PROBE_IMAGES,
    TOLERANCE,
    Answer,
    ExportSource,
    Writer,
    open_source,
)
from pipeline.export.to_onnx import write_onnx
from pipeline.export.to_timm import write_timm
from pipeline.storage import objects


def write_safetensors(source: ExportSource, folder: Path) -> Answer:
    folder.mkdir()
    path = folder / exported.WEIGHTS
    if isinstance(source.model, nfnet.NFNet):
        nfnet.save_weights(source.model, path)
        return lambda probe: nfnet.load_model(path)(probe.images)
    save_tensors(source.model.state_dict(), path)
    return lambda probe: source.made_with(load_tensors(path))(probe.images)


WRITERS: dict[str, Writer] = {"safetensors": write_safetensors, "timm": write_timm, "onnx": write_onnx}


def export(
    checkpoint_url: str,
    format: str,
    out: str,
    *,
    weights: WhichWeights = "evaluated",
    tolerance: float = TOLERANCE,
    facts: CardFacts = NO_FACTS,
    writers: Mapping[str, Writer] = WRITERS,
) -> Exported:
    """Write the checkpoint to `out`, a new folder at any URL; compared with the checkpoint first, whole or not at all.

    Args:
        weights: evaluated: the averaged ones where they were kept, else the raw ones.
        tolerance: largest difference of logits on the fixed batch, as a share of the largest logit. 0 for safetensors
            whatever is given: they are the same numbers.
        facts: what the model card says besides the run's record.
    Raises:
        UserError: no checkpoint, `out` is not empty, the format cannot express the network, or the logits differ.
    """
    if format not in writers:
        raise UserError(f"--format is {format!r}; choose one of {', '.join(writers)}")
    if not tolerance >= 0:
        raise UserError(f"--tolerance is {tolerance}; set a share of the largest logit, such as {TOLERANCE:g}")
    tolerance = 0.0 if format == "safetensors" else tolerance
    refuse_taken(out)
    return export_source(open_source(checkpoint_url, weights), format, out, tolerance, facts=facts, writers=writers)


def export_source(
    source: ExportSource,
    format: str,
    out: str,
    tolerance: float,
    *,
    facts: CardFacts = NO_FACTS,
    writers: Mapping[str, Writer] = WRITERS,
    more: Mapping[str, Any] | None = None,
) -> Exported:
    """`export`, of what is open already.

    Args:
        more: fields for `export.json`; `average` is shown on the model card too.
    """
    with _staged(out) as folder:
        difference = _compare(source, writers[format](source, folder), format, tolerance)
        check = {"images": PROBE_IMAGES, "difference": difference, "tolerance": tolerance}
        description = {"kind": format, "license": facts.license, **source.description(), "check": check, **(more or {})}
        card = model_card(source.model, source.commit, description, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = _listed(folder)
        shapes = {name: list(t.shape) for name, t in source.model.state_dict().items()}
        rest = {"files": files, "shapes": shapes, "buffers": source.commit.buffers, "run": source.commit.config}
        digest = exported.write(str(folder), {**description, **rest})
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
def _compare(source: ExportSource, answer: Answer, format: str, tolerance: float) -> float:
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


def _why(source: ExportSource, format: str) -> str:
    if format != "timm" or not isinstance(source.model, nfnet.NFNet):
        return ""
    from nfnet.weights.timm_export import timm_form

    return "".join(f" ({reason})" for reason in timm_form(source.model).approximations)


def refuse_taken(out: str) -> None:
    """UserError where something is at `out`, and for the Hub."""
    if out.startswith("hf://"):
        raise UserError(f"--out is {out}; give a folder or a bucket here, and send that with 'normfree push DIR {out}'")
    if objects.is_local(out):
        path = objects.local_path(out)
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    else:
        taken = bool(objects.list_urls(out)) or objects.exists(out)
    if taken:
        raise UserError(f"{out} is not empty; set --out to a new folder, or remove what is there")


@contextlib.contextmanager
def _staged(out: str) -> Iterator[Path]:
    """A folder to be filled, on the disk of a local `out`; removed afterwards unless it was moved there."""
    parent = None
    if objects.is_local(out):
        parent = objects.local_path(out).absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=objects.TEMP_PREFIX) as temporary:
        yield Path(temporary) / "export"


def _listed(folder: Path) -> list[FileInfo]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [
        {"name": p.relative_to(folder).as_posix(), "size_bytes": p.stat().st_size, "sha256": objects.sha256_file(p)}
        for p in paths
    ]


def _publish(folder: Path, out: str, names: list[str]) -> None:
    """`export.json` comes last; a store that fails on the way is left empty as it was."""
    if objects.is_local(out):
        os.replace(folder, objects.local_path(out).absolute())
        return
    try:
        for name in [*names, exported.NAME]:
            objects.put_file(folder / name, objects.join(out, name))
    except BaseException:
        with contextlib.suppress(Exception):
            objects.remove_tree(out)
        raise
