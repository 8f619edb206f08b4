"""Arguments of `normfree classify` and `export`: what a finished checkpoint is good for."""

from __future__ import annotations

from typing import Any

from orchestration.arguments.parser import add


def using_commands(commands: Any) -> None:
    _classify(commands)
    _export(commands)


def _classify(commands: Any) -> None:
    p = add(
        commands,
        "classify",
        "classify",
        "names and probabilities for images",
        [
            "normfree classify runs/c100 photo.jpg",
            "normfree classify exports/c100 photos/ 'more/*.png' s3://bucket/cat.webp --top 3 --json",
        ],
    )
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder (its newest one) or an exported folder"
    )
    p.add_argument("images", metavar="IMAGE", nargs="+", help="paths or URLs of images, folders, or patterns with *")
    p.add_argument("--top", type=int, default=5, metavar="N", help="classes to name (default %(default)s)")
    p.add_argument("--json", action="store_true", help="print one JSON list")


def _export(commands: Any) -> None:
    p = add(
        commands,
        "export",
        "export",
        "a checkpoint for other programs, with a model card; logits are compared before anything is kept",
        [
            "normfree export runs/c100 --format safetensors --out exports/c100",
            "normfree export runs/f0 --format timm --out exports/f0_timm",
            "normfree export s3://bucket/runs/c100 --format onnx --weights raw --out s3://bucket/exports/c100",
            "normfree export runs/c100 --format mlflow --out exports/c100_mlflow",
        ],
    )
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder (its newest one) or an exported folder"
    )
    p.add_argument("--format", required=True, choices=["safetensors", "timm", "onnx", "mlflow"])
    p.add_argument("--out", required=True, metavar="URL", help="a new folder or object-store prefix")
    p.add_argument(
        "--weights",
        choices=["evaluated", "ema", "raw"],
        default="evaluated",
        help="evaluated: the averaged ones where the run kept them, else the raw ones (default)",
    )
    p.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference of logits, as a share of the largest (default %(default)s)",
    )
