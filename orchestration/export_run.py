"""`normfree export` and `normfree classify`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from pipeline.classify import Prediction, predictions
from pipeline.errors import UserError
from pipeline.export import TOLERANCE, WRITERS, Answer, Source, WhichWeights
from pipeline.export import export as export_with
from pipeline.exported import Exported


def _write_mlflow(source: Source, folder: Path) -> Answer:
    from orchestration.export_mlflow import write_mlflow

    return write_mlflow(source, folder)


ALL_WRITERS = {**WRITERS, "mlflow": _write_mlflow}


def export(
    checkpoint_url: str, format: str, out: str, *, weights: WhichWeights = "evaluated", tolerance: float = TOLERANCE
) -> Exported:
    """`pipeline.export.export` with all formats: safetensors, timm, onnx and mlflow.

    Raises:
        UserError: as there; nothing is left at `out` then.
    """
    return export_with(checkpoint_url, format, out, weights=weights, tolerance=tolerance, writers=ALL_WRITERS)


_NEXT = {
    "safetensors": "normfree classify {out} IMAGE...",
    "timm": "timm.create_model('local-dir:{out}', pretrained=True)",
    "onnx": "onnxruntime.InferenceSession('{out}/model.onnx')",
    "mlflow": "mlflow models predict --model-uri {out} --env-manager local "
    "--input-path {out}/serving_input_example.json",
}


def export_run(args: argparse.Namespace) -> int:
    made = export(args.checkpoint, args.format, args.out, weights=args.weights, tolerance=args.tolerance)
    kind = "averaged" if made.weights == "ema" else "raw"
    agrees = "logits are equal" if made.difference == 0 else f"logits differ by {made.difference:.1e} of the largest"
    print(f"{made.source_url} ({kind} weights, digest {made.source_digest[:12]}) on a fixed batch: {agrees}")
    print(f"made {made.url} ({len(made.files) + 1} files, {made.size_bytes / 1e6:.1f} MB, digest {made.digest[:12]})")
    print("next: " + _NEXT[made.kind].format(out=shlex.quote(made.url)))
    return 0


def classify_run(args: argparse.Namespace) -> int:
    """Prints each batch as it is done; what could not be read is said at the end, and makes the exit code 2."""
    failed: list[Prediction] = []
    rows = []
    for found in predictions(args.checkpoint, args.images, args.top):
        if found.error:
            failed.append(found)
        if args.json:
            ranked = [{"class": name, "probability": share} for name, share in found.ranked]
            rows.append(
                {"image": found.image, "predictions": ranked, **({"error": found.error} if found.error else {})}
            )
        elif not found.error:
            print(f"{found.image}: " + ", ".join(f"{name} {share:.1%}" for name, share in found.ranked), flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    if not failed:
        return 0
    if len(failed) == 1:
        raise UserError(f"{failed[0].image} cannot be classified: {failed[0].error}")
    for one in failed:
        print(f"{one.image} cannot be classified: {one.error}", file=sys.stderr)
    raise UserError(f"{len(failed)} images cannot be classified, they are named above; give files that are images")
