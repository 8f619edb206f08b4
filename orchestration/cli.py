"""The command `normfree`. Arguments only: each handler imports what it needs when it runs, so `--help` is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

EXIT_OURS, EXIT_USER = 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"normfree: {message}; see '{self.prog} --help'", file=sys.stderr)
        raise SystemExit(EXIT_USER)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="normfree",
        description="Pretrain normaliser-free image networks from WebDataset shards and measure what they are worth on tasks.",
        epilog="A first run, without any data of your own:  make demo",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _data_commands(commands)
    _training_commands(commands)
    _transfer_commands(commands)
    _track_commands(commands)
    _registry_commands(commands)
    _using_commands(commands)
    return parser


def _data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="datasets: prepare, index, verify, overlap, bench, cards")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    _data_prepare(actions)
    _data_index(actions)
    p = _add(
        actions,
        "verify",
        "data_verify",
        "check every byte and every image of a dataset against its manifest",
        ["normfree data verify data/cifar100", "normfree data verify s3://bucket/imagenet --workers 16"],
    )
    p.add_argument("url", metavar="URL")
    _workers(p)
    _data_overlap(actions)
    _data_bench(actions)
    _add(actions, "cards", "data_cards", "list the catalogue", ["normfree data cards"])


def _data_prepare(actions: Any) -> None:
    p = _add(
        actions,
        "prepare",
        "data_prepare",
        "raw images -> WebDataset shards and a manifest; the same command again goes on where it was killed",
        [
            "normfree data prepare glyphs --out data/glyphs",
            "normfree data prepare cifar100 --source cifar100.tar --out data/cifar100",
            "normfree data prepare flowers --source photos.zip --val-share 0.2 --out s3://bucket/flowers",
            "normfree data prepare imagenet --source ILSVRC2012/ --resize-shortest 512 --out data/imagenet",
            "normfree data prepare images --source photos.csv --out data/photos",
        ],
    )
    p.add_argument(
        "card", metavar="CARD", help="name of a card ('normfree data cards' lists them) or path of a card's YAML"
    )
    p.add_argument(
        "--source",
        metavar="URL",
        help="folder, tar or zip of <split>/<class>/<file>; folder with the tars of ILSVRC-2012 and its devkit; CSV or "
        "JSONL with path, label, split; parquet file or folder; not for embedded sets",
    )
    p.add_argument("--out", required=True, metavar="URL", help="folder or object-store prefix to write to")
    p.add_argument("--splits", metavar="A,B", help="only these of the splits that the source has")
    p.add_argument(
        "--val-share",
        type=float,
        metavar="X",
        help="for sources without splits: the share of each class that becomes val",
    )
    p.add_argument("--seed", type=int, default=0, help="of the shuffle at writing (default %(default)s)")
    p.add_argument("--shard-mb", type=float, default=64, metavar="MB", help="size of a shard (default %(default)s)")
    p.add_argument("--shard-samples", type=int, metavar="N", help="images of a shard, in place of its size")
    p.add_argument("--resize-shortest", type=int, metavar="PX", help="scale larger images down to this shortest side")
    p.add_argument("--resize-longest", type=int, metavar="PX", help="scale larger images down to this longest side")
    p.add_argument(
        "--jpeg-quality",
        type=int,
        metavar="Q",
        help="write every image anew as JPEG of this quality (default: bytes stay; 95 for those that are scaled)",
    )
    _bad_share(p)
    _workers(p)


def _data_index(actions: Any) -> None:
    p = _add(
        actions,
        "index",
        "data_index",
        "adopt existing WebDataset tars: a manifest beside them; the tars are not touched",
        [
            "normfree data index s3://bucket/imagenet-wds",
            "normfree data index data/wds --split train='imagenet-train-*.tar' --split val='imagenet-val-{000..049}.tar'",
            "normfree data index 'data/wds/*.tar' --classes wnids.txt --label-field wnid",
        ],
    )
    p.add_argument("url", metavar="URL", help="folder with *.tar at any depth, or a pattern with * or {000..099}")
    p.add_argument(
        "--split", action="append", metavar="NAME=PATTERN", help="tars of a split (default: by names, else all train)"
    )
    p.add_argument("--classes", metavar="FILE", help="class names in label order, one a line (default: as labels say)")
    p.add_argument("--label-field", metavar="NAME", help="of JSON labels (default: label, cls, class and the like)")
    p.add_argument("--name", help="of the dataset (default: the folder's)")
    _bad_share(p)
    _workers(p)


def _data_overlap(actions: Any) -> None:
    p = _add(
        actions,
        "overlap",
        "data_overlap",
        "which images of B (a test split) are in A (an upstream set), also re-encoded or resized",
        [
            "normfree data overlap data/imagenet data/flowers --out flowers_in_imagenet.csv",
            "normfree data overlap s3://bucket/up data/cifar10 --split-b val --radius 4 --out pairs.json",
        ],
    )
    p.add_argument("a", metavar="A", help="a prepared or indexed dataset")
    p.add_argument("b", metavar="B", help="another")
    p.add_argument("--split-a", metavar="A,B", help="splits of A (default: all)")
    p.add_argument("--split-b", metavar="A,B", help="splits of B (default: test, else val)")
    p.add_argument("--radius", type=int, default=6, metavar="BITS", help="of 64-bit hashes (default %(default)s)")
    p.add_argument("--no-confirm", action="store_true", help="trust the hashes: do not read and compare the images")
    p.add_argument("--show", type=int, default=20, metavar="N", help="pairs to print (default %(default)s)")
    p.add_argument("--out", metavar="FILE", help="all pairs as .csv or .json")


def _data_bench(actions: Any) -> None:
    p = _add(
        actions,
        "bench",
        "data_bench",
        "images per second that a dataset gives, per number of loader processes",
        ["normfree data bench data/cifar100", "normfree data bench s3://bucket/imagenet --workers 0,2,4,8 --px 224"],
    )
    p.add_argument("url", metavar="URL")
    p.add_argument("--split", default="train")
    p.add_argument(
        "--workers", default="0,1,2", metavar="N,N,...", help="loader processes to try (default %(default)s)"
    )
    p.add_argument("--px", type=int, default=224, help="side of the training images (default %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="images of a batch (default %(default)s)")
    p.add_argument("--seconds", type=float, default=5, help="to measure for, each time (default %(default)s)")
    p.add_argument("--cache-gb", type=float, default=0, help="shard cache for object stores (default none)")


def _bad_share(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--max-bad-share",
        type=float,
        default=0.001,
        metavar="X",
        help="stop if more than this share of images cannot be used (default %(default)s); those left out are listed",
    )


def _workers(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one a core); changes nothing but speed"
    )


def _training_commands(commands: Any) -> None:
    p = _add(
        commands,
        "inspect",
        "inspect",
        "a network in numbers: stages, parameters, multiply-adds, activation memory; its signal propagation as a plot",
        [
            "normfree inspect nfnet_f4_plus",
            "normfree inspect nfnet_tiny --px 64 --batch 32 --json",
            "normfree inspect nf_resnet50 --signal signal.png",
            "normfree inspect timm:resnetv2_50 --signal peer.png",
        ],
    )
    p.add_argument("model", metavar="MODEL", help="one of ours, or timm:NAME to compare with")
    p.add_argument("--px", type=int, help="count multiply-adds at this size too, and measure signals at it")
    p.add_argument(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="images, for activation memory and signals (default %(default)s)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument(
        "--signal", metavar="FILE", help="draw signal propagation, measured and predicted: .png, .svg or .pdf"
    )
    p.add_argument("--seed", type=int, default=0, help="of weights and noise for --signal (default %(default)s)")
    p.add_argument(
        "--skip-init",
        type=float,
        default=1.0,
        metavar="X",
        help="gain of the residual branches for --signal (default %(default)s)",
    )
    p.add_argument("--device", metavar="DEVICE", help="for --signal; default: a GPU where there is one")

    p = _add(
        commands,
        "pretrain",
        "pretrain",
        "train a recipe; the same command again resumes",
        [
            "normfree pretrain nfnet_tiny_glyphs --data.url data/glyphs --out runs/glyphs",
            "normfree pretrain nfnet_tiny_cifar100 --data.url data/cifar100 --out runs/c100 --num-processes 2",
            "normfree pretrain run.yaml --out runs/mine --optim.learning_rate 0.2 --duration '30 epochs'",
            "normfree pretrain nfnet_f0_imagenet --show",
            "normfree pretrain --list",
        ],
    )
    p.add_argument("recipe", nargs="?", metavar="RECIPE|FILE.yaml")
    p.add_argument("--list", action="store_true", help="print the recipes, one a line, and stop")
    p.add_argument("--out", metavar="URL", help="run folder: checkpoints, records, configuration")
    p.add_argument("--num-processes", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    p.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: SQLite in the run folder")
    p.add_argument("--show", action="store_true", help="print the recipe's header and resolved configuration, and stop")
    p.epilog = (
        p.epilog or ""
    ) + "\n\nAny field of the configuration is an option by its path: --optim.weight_decay 1e-5"

    p = _add(
        commands,
        "evaluate",
        "evaluate",
        "accuracy of a checkpoint on a prepared dataset with the same classes",
        ["normfree evaluate runs/c100 data/cifar100"],
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest one)")
    p.add_argument("data", metavar="URL", help="a prepared dataset")
    p.add_argument("--split", default="val")
    p.add_argument("--weights", choices=["evaluated", "ema", "raw"], default="evaluated")


def _transfer_commands(commands: Any) -> None:
    p = _add(
        commands,
        "transfer",
        "transfer",
        "few-shot and fine-tuning trials on a suite of tasks, against from scratch",
        [
            "normfree transfer runs/glyphs --suite demo --data-root data --out sweeps/demo",
            "normfree transfer s3://bucket/runs/c100 --suite small_images --data-root data --out sweeps/c100 --seeds 5",
            "normfree transfer ours=runs/c100 runs/convnext 'timm:convnext_atto@atto.safetensors' --suite small_images "
            "--data-root data --out sweeps/compared",
            "normfree transfer nfnet_f0@F0_haiku.npz --suite my.yaml --data-root data --out sweeps/f0 --budget '2 hours'",
        ],
    )
    p.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="+",
        help="a checkpoint or run folder; NAME@FILE, one of our networks and a file of published weights; timm:NAME[@FILE], "
        "timm's own weights or a local file's. Several stand in one table, each with its from-scratch twin; LABEL=CHECKPOINT "
        "names one",
    )
    p.add_argument("--suite", required=True, metavar="SUITE", help="name of a suite or path of its YAML")
    p.add_argument("--data-root", required=True, metavar="URL", help="holds one prepared dataset a task: ROOT/<card>")
    p.add_argument("--out", required=True, metavar="URL", help="sweep folder; the same command again resumes")
    p.add_argument("--seeds", type=int, help="supports drawn for each cell (default: the suite's)")
    p.add_argument(
        "--scheduler",
        choices=["halving", "hyperband", "asha", "none"],
        default="halving",
        help="which candidates of a search go on: halving and hyperband decide from what is written down, so any two sweeps "
        "select the same; asha is quicker and depends on which trial is first; none stops nobody (default %(default)s)",
    )
    p.add_argument(
        "--budget", metavar="TEXT", help="for this call: '100 trials', '1e6 images', '2 hours', or several with commas"
    )
    p.add_argument("--trial-limit", metavar="TIME", help="a trial that takes longer is a failed one, as '30 minutes'")
    p.add_argument("--max-concurrent", type=int, metavar="N", help="trials at a time (default: one a core)")
    p.add_argument(
        "--gpus-per-trial",
        type=float,
        metavar="X",
        help="share of a GPU, 0 to 1, or whole GPUs: as many processes a trial (default: all GPUs over the trials at a time)",
    )
    p.add_argument(
        "--processes-per-trial", type=int, metavar="N", help="of fine-tuning trials, a core or GPU each (default: 1)"
    )
    p.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster, host:port; default: a Ray of its own on this machine"
    )
    p.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: SQLite in the sweep folder")

    p = _add(
        commands,
        "report",
        "report",
        "scorecard of sweeps: table, CSV, HTML page, picture; or one cell of it, run again",
        [
            "normfree report sweeps/demo",
            "normfree report sweeps/c100 sweeps/timm --out docs/results/c100 --overlap cifar10=overlap.csv",
            "normfree report sweeps/demo --rerun digits-ridge-pretrained-5",
        ],
    )
    p.add_argument("sweep", metavar="URL", nargs="+", help="sweep folders; several stand side by side")
    p.add_argument("--out", metavar="DIR", help="default: the first sweep folder's report/")
    p.add_argument(
        "--overlap",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="what 'data overlap UPSTREAM TASK --out FILE' wrote: scores with and without these images; again for each task",
    )
    p.add_argument("--data-root", metavar="DIR", help="where the datasets lie now; default: where the sweep read them")
    p.add_argument(
        "--rerun",
        metavar="CELL",
        help="run this cell's trials again; exit 0 if the mean lands in the recorded interval, else 1",
    )

    p = _add(
        commands,
        "ui",
        "ui",
        "open MLflow on a run's or sweep's records; with --team, serve it to a group from PostgreSQL and a bucket",
        [
            "normfree ui runs/glyphs",
            "normfree ui --tracking-uri sqlite:///demo/mlflow.db --port 5001",
            "PGPASSWORD=... MLFLOW_AUTH_ADMIN_PASSWORD=... normfree ui --team \\",
            "      --tracking-uri postgresql://mlflow@db/mlflow --artifacts s3://bucket/mlflow --host 0.0.0.0",
        ],
    )
    p.add_argument("run", nargs="?", metavar="DIR", help="a run or sweep folder")
    p.add_argument("--tracking-uri", metavar="URI")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=5000)
    p.add_argument("--team", action="store_true", help="users with passwords, PostgreSQL, artifacts in a bucket")
    p.add_argument("--artifacts", metavar="URL", help="with --team: where files go, as s3://bucket/mlflow")
    p.add_argument(
        "--allowed-hosts", metavar="A,B", help="with --team: names under which browsers reach it (default: local ones)"
    )
    p.add_argument("--workers", type=int, default=4, metavar="N", help="with --team: server processes (default 4)")


def _track_commands(commands: Any) -> None:
    track = commands.add_parser("track", help="records of runs: import, status")
    actions = track.add_subparsers(dest="action", metavar="ACTION", required=True)
    p = _add(
        actions,
        "import",
        "track_import",
        "send the records of a run to a server, what is not there yet; a second time changes nothing",
        [
            "normfree track import runs/c100 --tracking-uri http://mlflow:5000",
            "normfree track import s3://bucket/runs/c100 --tracking-uri http://mlflow:5000",
        ],
    )
    p.add_argument("run", metavar="RUN", help="run folder, local or in an object store")
    p.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else SQLite in the run folder")
    p.add_argument("--experiment", metavar="NAME", help="default: the one that the run was made for")
    p.add_argument("--run-name", metavar="NAME", help="default: the run's own")
    p = _add(
        actions,
        "status",
        "track_status",
        "list runs and how they ended; runs whose machine fell silent are marked as failed",
        ["normfree track status runs/c100", "normfree track status --tracking-uri http://mlflow:5000"],
    )
    p.add_argument("run", nargs="?", metavar="DIR", help="a run or sweep folder")
    p.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else SQLite in the folder")
    p.add_argument("--limit", type=int, default=100, metavar="N", help="runs to list (default %(default)s)")


def _registry_commands(commands: Any) -> None:
    p = _add(
        commands,
        "pull",
        "pull",
        "fetch a checkpoint into a local folder and verify every byte; the same command again goes on where it broke",
        [
            "normfree pull s3://bucket/runs/c100 --to c100",
            "normfree pull models:/digits@champion --tracking-uri http://mlflow.example:5000",
            "normfree pull s3://bucket/runs/f0 --format timm --to f0_timm",
        ],
    )
    p.add_argument(
        "url",
        metavar="URL",
        help="a checkpoint, a run folder (its newest one), models:/NAME@ALIAS or models:/NAME/VERSION",
    )
    p.add_argument("--to", metavar="DIR", help="a new local folder (default: ./ and the last part of the name)")
    p.add_argument(
        "--format",
        choices=["safetensors", "timm", "onnx"],
        help="end with an exported folder in place of the checkpoint",
    )
    p.add_argument(
        "--connections", type=int, default=8, metavar="N", help="parts fetched at a time (default %(default)s)"
    )
    p.add_argument("--tracking-uri", metavar="URI", help="of models:/...: MLflow; default: MLFLOW_TRACKING_URI")

    p = _add(
        commands,
        "register",
        "register",
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


def _using_commands(commands: Any) -> None:
    p = _add(
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

    p = _add(
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


def _add(parent: Any, name: str, handler: str, summary: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n  " + "\n  ".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(handler=handler)
    return parser


def _dotted(rest: Sequence[str]) -> dict[str, str]:
    """["--optim.learning_rate", "0.2", "--seed=3"] -> {"optim.learning_rate": "0.2", "seed": "3"}."""
    from pipeline.errors import UserError

    fields: dict[str, str] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; fields are given as --path.of.field value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"--{name} needs a value")
            value = words.pop(0)
        fields[name] = value
    return fields


def _refuse_secrets(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Before anything is written: what is given here reaches records, reports and trackers."""
    from pipeline.redact import refuse_secrets

    # An MLflow server's address may hold a password; it is passed on by the environment and shown without.
    values = [value for name, value in vars(args).items() if name != "tracking_uri"]
    refuse_secrets(values, "the command")
    refuse_secrets([word.partition("=")[2] or word for word in rest], "the command")


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = build_parser().parse_known_args(argv)
    debug = args.debug
    try:
        _refuse_secrets(args, rest)
        if rest and args.command != "pretrain":
            from pipeline.errors import UserError

            raise UserError(f"unknown argument {rest[0]!r}; see 'normfree {args.command} --help'")
        args.fields = _dotted(rest)
        from orchestration import commands

        return int(getattr(commands, args.handler)(args))
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read us ("| head") has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except Exception as error:
        if debug:
            raise
        from pipeline.errors import UserError
        from pipeline.redact import public

        if isinstance(error, UserError):
            print(f"normfree: {public(str(error))}", file=sys.stderr)
            return EXIT_USER
        print(
            f"normfree: {type(error).__name__}: {public(str(error))} (a fault of ours; --debug shows where)",
            file=sys.stderr,
        )
        return EXIT_OURS


def program() -> None:
    """The command `normfree`: `main` in a process of its own."""
    from pipeline.ending import end

    end(main())


if __name__ == "__main__":
    program()
