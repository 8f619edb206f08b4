"""`normfree classify`, `export`, `register` and `unregister`: what a finished checkpoint is good for."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import doing, say, warn
from orchestration.commands.parser import add
from pipeline.display import shell
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.checkpoint.exported import Exported
    from pipeline.models.classify import Prediction


def model_commands(commands: Any) -> None:
    _classify(commands)
    _export(commands)
    _register(commands)
    _unregister(commands)


def _classify(commands: Any) -> None:
    p = add(
        commands,
        "classify",
        classify,
        "names and probabilities for images",
        [
            "normfree classify runs/c100 photo.jpg",
            "normfree classify exports/c100 photos/ 'more/*.png' s3://bucket/cat.webp --top 3 --json",
        ],
    )
    p.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint, a run folder (its newest one) or an exported folder; also NAME@FILE, FILE.safetensors and "
        "timm:NAME[@FILE], whose classes are numbers where nobody names them",
    )
    p.add_argument("images", metavar="IMAGE", nargs="+", help="paths or URLs of images, folders, or patterns with *")
    p.add_argument("--top", type=int, default=5, metavar="N", help="classes to name (default %(default)s)")
    p.add_argument("--json", action="store_true", help="print one JSON list")


@doing("classifying")
def classify(args: argparse.Namespace) -> int:
    """Prints each batch as it is done; what could not be read is reported at the end, and makes the exit code 2."""
    from pipeline.models.classify import predictions

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
            say(f"{found.image}: " + ", ".join(f"{name} {share:.1%}" for name, share in found.ranked))
    if args.json:
        print(json.dumps(rows, indent=1))
    if not failed:
        return 0
    if len(failed) == 1:
        raise UserError(f"{failed[0].image} cannot be classified: {failed[0].error}")
    for one in failed:
        warn(f"{one.image} cannot be classified: {one.error}")
    raise UserError(f"{len(failed)} images cannot be classified, they are named above; give files that are images")


def _export(commands: Any) -> None:
    p = add(
        commands,
        "export",
        export,
        "a checkpoint for other programs, with a model card; logits are compared before anything is kept",
        [
            "normfree export runs/c100 --format safetensors --out exports/c100",
            "normfree export runs/f0 --format timm --out exports/f0_timm",
            "normfree export s3://bucket/runs/c100 --format onnx --weights raw --out s3://bucket/exports/c100",
            "normfree export runs/c100 --format mlflow --out exports/c100_mlflow",
            "normfree export runs/c100 --format timm --out exports/c100_timm --license apache-2.0 --scorecard sweeps/c100",
        ],
    )
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run folder (its newest one) or an exported folder"
    )
    p.add_argument("--format", required=True, choices=["safetensors", "timm", "onnx", "mlflow"])
    p.add_argument("--out", required=True, metavar="URL", help="a new folder or object-store prefix")
    export_options(p)


def export_options(p: argparse.ArgumentParser) -> None:
    """Of everything that makes an exported folder."""
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
    p.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="for the model card, as Hugging Face lists them: apache-2.0, other, ...",
    )
    p.add_argument(
        "--scorecard", metavar="SWEEP", help="for the model card: sweep folder of a transfer of this checkpoint"
    )


NEXT = {
    "safetensors": "normfree classify {out} IMAGE...",
    "timm": "timm.create_model('local-dir:{out}', pretrained=True)",
    "onnx": "onnxruntime.InferenceSession('{out}/model.onnx')",
    "mlflow": "mlflow models predict --model-uri {out} --env-manager local "
    "--input-path {out}/serving_input_example.json",
}


@doing("exporting, and comparing the answers")
def export(args: argparse.Namespace) -> int:
    made = export_as_asked(args, args.checkpoint, args.out)
    kind = "averaged" if made.weights == "ema" else "raw"
    agrees = "logits are equal" if made.difference == 0 else f"logits differ by {made.difference:.1e} of the largest"
    say(f"{made.source_url} ({kind} weights, digest {made.source_digest[:12]}) on a fixed batch: {agrees}")
    say(f"made {made.url} ({len(made.files) + 1} files, {made.size_bytes / 1e6:.1f} MB, digest {made.digest[:12]})")
    say("next: " + NEXT[made.kind].format(out=shell([made.url])))
    return 0


def export_as_asked(args: argparse.Namespace, checkpoint: str, out: str) -> Exported:
    """`pipeline.export.export` with all formats, by the options of `export_options`.

    Raises:
        UserError: as there; nothing is left at `out` then.
    """
    from orchestration.registry.card_results import card_facts
    from orchestration.registry.export_mlflow import ALL_WRITERS
    from pipeline.export.export import export as export_with

    return export_with(
        checkpoint,
        args.format,
        out,
        weights=args.weights,
        tolerance=args.tolerance,
        facts=card_facts(checkpoint, args.license, args.scorecard),
        writers=ALL_WRITERS,
    )


def _register(commands: Any) -> None:
    p = add(
        commands,
        "register",
        register,
        "give a checkpoint a name in MLflow's model registry; its bytes stay where they are",
        [
            "normfree register s3://bucket/runs/c100 c100 --alias champion --tracking-uri http://mlflow.example:5000",
            "normfree register runs/glyphs glyphs --scorecard sweeps/demo --tracking-uri sqlite:///demo/mlflow.db",
        ],
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest one)")
    p.add_argument("name", metavar="NAME", help="of the model in the registry")
    p.add_argument("--alias", metavar="ALIAS", help="such as champion; moved here if another version has it")
    p.add_argument("--scorecard", metavar="SWEEP", help="sweep folder of a transfer of this checkpoint")
    p.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI")


@doing("verifying and registering")
def register(args: argparse.Namespace) -> int:
    from orchestration.registry import registry
    from pipeline.secrets import public

    made = registry.register(
        args.checkpoint, args.name, alias=args.alias, scorecard=args.scorecard, tracking_uri=args.tracking_uri
    )
    what = "registered" if made.is_new else "was registered before"
    say(f"{what}: {made.name} version {made.version}, {public(made.source)}, digest {made.digest}")
    if made.note:
        say(f"note: {made.note}")
    place = f"{made.name}@{args.alias}" if args.alias else f"{made.name}/{made.version}"
    where = " " + shell(["--tracking-uri", public(args.tracking_uri)]) if args.tracking_uri else ""
    say(f"next: normfree pull {shell([f'models:/{place}'])}{where}")
    return 0


def _unregister(commands: Any) -> None:
    p = add(
        commands,
        "unregister",
        unregister,
        "take a version out of the registry and unpin its checkpoint, whose bytes stay where they are",
        [
            "normfree unregister models:/c100/3 --tracking-uri http://mlflow.example:5000",
            "normfree unregister s3://bucket/runs/c100 --tracking-uri http://mlflow.example:5000",
        ],
    )
    p.add_argument(
        "target",
        metavar="VERSION|RUN",
        help="models:/NAME/VERSION or models:/NAME@ALIAS; a checkpoint or run folder: nothing is deleted, and the pins of "
        "versions that were deleted in MLflow's pages are taken back",
    )
    p.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI")


@doing("unregistering")
def unregister(args: argparse.Namespace) -> int:
    from orchestration.registry import registry
    from pipeline.secrets import public

    done = registry.unregister(args.target, args.tracking_uri)
    if done.version:
        say(f"unregistered: {done.version.name} version {done.version.version}, {public(done.version.source)}")
    say(*(f"unpinned: {public(url)}" for url in done.unpinned))
    for url, reasons in done.kept.items():
        say(*(f"still kept: {public(url)}: {public(why)}" for why in reasons))
    if done.note:
        say(f"note: {done.note}")
    if not done.version and not done.unpinned:
        say(f"nothing to do: {args.target} has no pin of a version that is gone")
    return 0
