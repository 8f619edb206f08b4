"""Arguments of `normfree inspect`, `pretrain` and `evaluate`."""

from __future__ import annotations

from typing import Any

from orchestration.arguments.parser import add


def training_commands(commands: Any) -> None:
    _inspect(commands)
    _pretrain(commands)
    _evaluate(commands)


def _inspect(commands: Any) -> None:
    p = add(
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


def _pretrain(commands: Any) -> None:
    p = add(
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
    p.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI, else SQLite in the run folder"
    )
    p.add_argument("--show", action="store_true", help="print the recipe's header and resolved configuration, and stop")
    p.epilog = (
        p.epilog or ""
    ) + "\n\nAny field of the configuration is an option by its path: --optim.weight_decay 1e-5"


def _evaluate(commands: Any) -> None:
    p = add(
        commands,
        "evaluate",
        "evaluate",
        "accuracy of a checkpoint on a prepared dataset with the same classes",
        [
            "normfree evaluate runs/c100 data/cifar100",
            "normfree evaluate runs/f0 data/imagenet --real-labels real.json",
            "normfree evaluate nfnet_f0@F0_haiku.npz data/imagenet_v2",
        ],
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest one)")
    p.add_argument("data", metavar="URL", help="a prepared dataset")
    p.add_argument("--split", help="default val, or test where there is none")
    p.add_argument("--weights", choices=["evaluated", "ema", "raw"], default="evaluated")
    p.add_argument("--real-labels", metavar="FILE", help="ReaL's real.json, for ImageNet's validation images")
