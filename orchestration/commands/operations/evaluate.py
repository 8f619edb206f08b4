"""`normfree evaluate`: accuracy of a checkpoint, with several views of each image and with a temperature where asked."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestration.commands.operations.average import refuse_split
from orchestration.commands.output import doing, say
from orchestration.commands.parser import add, number
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.data.augment.augment_config import AugmentConfig
    from pipeline.data.loading.batches import Change
    from pipeline.distributed import World
    from pipeline.records import Evaluation
    from pipeline.training.evaluate import Scores

    Measured = Callable[..., tuple[Evaluation, Scores | None]]


def evaluate_command(commands: Any) -> None:
    p = add(
        commands,
        "evaluate",
        evaluate,
        "accuracy of a checkpoint on a prepared dataset with the same classes",
        [
            "normfree evaluate runs/c100 data/cifar100",
            "normfree evaluate runs/f0 data/imagenet --real-labels real.json",
            "normfree evaluate nfnet_f0@F0_haiku.npz data/imagenet_v2",
            "normfree evaluate runs/imagenet data/imagenet --corruptions all",
            "normfree evaluate timm:resnet18 data/imagenet_a",
            "normfree evaluate runs/c100 data/cifar100 --split test --flip --crops 5 --fit-temperature val",
        ],
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest one)")
    p.add_argument("data", metavar="URL", help="a prepared dataset")
    p.add_argument("--split", help="default val, or test where there is none")
    p.add_argument("--weights", choices=["evaluated", "ema", "raw"], default="evaluated")
    p.add_argument("--real-labels", metavar="FILE", help="ReaL's real.json, for ImageNet's validation images")
    p.add_argument(
        "--flip", action="store_true", help="mean of the probabilities of each image and of its mirror image"
    )
    p.add_argument(
        "--crops",
        type=number(int, 1, 5),
        choices=[1, 5],
        default=1,
        help="5: mean over the four corners and the centre (default: the centre)",
    )
    p.add_argument(
        "--corruptions",
        metavar="A,B",
        help="all, or some of ImageNet-C's corruptions, made while images are read: error at severities 1 to 5, and the mean "
        "corruption error (five passes a corruption)",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument("--temperature", type=number(float, 1e-3), metavar="T", help="divide the logits by it")
    how.add_argument(
        "--fit-temperature", metavar="SPLIT", help="fit it on this held-out split, never test, and report with it"
    )


@doing("evaluating")
def evaluate(args: argparse.Namespace) -> int:
    from pipeline.checkpoint import load
    from pipeline.data.augment.corruptions import names_of
    from pipeline.data.format.manifest import Manifest
    from pipeline.distributed import join
    from pipeline.models.backbone import load_backbone, spelled
    from pipeline.models.evaluation_options import OfClasses, activation_of, with_views
    from transfer.protocol import imagenet_labels

    names = names_of(args.corruptions.split(","), "--corruptions") if args.corruptions else ()
    loaded = load_backbone(args.checkpoint, args.weights)
    manifest = Manifest.open(args.data)
    split = args.split or ("val" if "val" in manifest.splits else "test")
    if activation_of(loaded.config) == "sigmoid":
        _refuse_of_classes_by_themselves(args)
    columns = _columns(args.data, manifest.outputs, loaded.classes)
    if args.fit_temperature:
        origin = {} if spelled(args.checkpoint) else load.resolve(loaded.url, load.default_cache()).dataset
        refuse_split(args.fit_temperature, manifest.digest, origin, loaded.config)
        if args.fit_temperature == split:
            raise UserError(
                f"--fit-temperature {split} is the split that is reported; fit on another, or report one with --split"
            )
    real_labels = args.real_labels or ""
    real_url = imagenet_labels.find_extra_test_sets(
        manifest, split, real_labels=real_labels, v2="", data_root="."
    ).real_url
    world = join()
    keeps = bool(real_labels or args.fit_temperature or args.temperature)
    if keeps and world.size > 1:
        option = next(
            f"--{n.replace('_', '-')}" for n in ("real_labels", "fit_temperature", "temperature") if getattr(args, n)
        )
        raise UserError(f"{option} needs all scores in one process; run normfree evaluate without torchrun")
    model = loaded.model if columns is None else OfClasses(loaded.model, columns)
    network, augment = with_views(model, loaded.augment, flip=args.flip, crops=args.crops)
    measured = partial(
        _measured, network.to(world.device), augment, args, world, keeps=keeps, convert_icc=loaded.convert_icc
    )
    result, scores = measured(split)
    words = []
    if real_labels and scores:
        words.append(f"ReaL {imagenet_labels.real_top1(real_url, args.data, split, scores.samples, scores.logits):.2%}")
    if not world.is_main:
        return 0
    shown = ", ".join([f"top-1 {result.top1:.2%}", f"top-5 {result.top5:.2%}", *words, f"loss {result.loss:.4f}"])
    say(f"{loaded.url} on {split} of {args.data}: {shown}, {result.num_samples} images")
    if scores and (args.temperature or args.fit_temperature):
        _say_temperature(args, scores, measured)
    if args.corruptions:
        _say_corruptions(names, split, 1 - result.top1, len(loaded.classes), measured)
    return 0


def _columns(place: str, classes: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """The network's outputs for the classes of a data set that has some of them; None where it has all. UserError for others."""
    from transfer.protocol import imagenet_labels

    if imagenet_labels.is_same(classes, ours):
        return None
    columns = imagenet_labels.columns_of(classes, ours)
    if columns is None:
        raise UserError(
            f"{place} has other classes than the checkpoint was trained on; use 'normfree transfer' for a new task"
        )
    say(f"{place} has {len(columns)} of the {len(ours)} classes, by WordNet's names; the choice is among these")
    return columns


def _refuse_of_classes_by_themselves(args: argparse.Namespace) -> None:
    """What is defined by probabilities that add up to 1."""
    usual = {"flip": False, "crops": 1, "temperature": None, "fit_temperature": None}
    for option, value in usual.items():
        if getattr(args, option) != value:
            raise UserError(
                f"--{option.replace('_', '-')} is of a softmax, and {args.checkpoint} was trained with optim.loss binary; leave "
                "it out"
            )


def _measured(
    network: "nn.Module",
    augment: "AugmentConfig",
    args: argparse.Namespace,
    world: "World",
    split: str,
    *,
    keeps: bool,
    convert_icc: bool,
    change: "Change | None" = None,
) -> "tuple[Evaluation, Scores | None]":
    """What the network has on a split, and if it `keeps` them its logits."""
    from pipeline.data.loading.datasets import DataConfig, EvalData
    from pipeline.training.evaluate import Scores
    from pipeline.training.evaluate import evaluate as measure

    kept: list[Scores] = []
    data = EvalData(DataConfig(url=args.data, eval_split=split, convert_icc=convert_icc), augment, change=change)
    result = measure(
        network,
        data,
        augment,
        world=world,
        batch_size=256,
        step=0,
        weights=args.weights,
        on_scores=kept.append if keeps else None,
    )
    assert result is not None  # nobody can give it up
    return result, kept[0] if kept else None


def _say_corruptions(names: Sequence[str], split: str, clean: float, num_classes: int, measured: "Measured") -> None:
    """A line of errors for each corruption, severities 1 to 5, then the mean over corruptions."""
    from pipeline.data.augment.corruptions import CORRUPTIONS, NOT_OFFERED, SEVERITIES, corrupt

    errors = []
    for name in names:
        found = []
        for severity in SEVERITIES:
            result, _ = measured(split, change=partial(corrupt, name, severity))
            found.append(1 - result.top1)
        errors.append(sum(found) / len(found))
        say(f"{name}: error {', '.join(f'{e:.2%}' for e in found)}; mean {errors[-1]:.2%}")
    say(f"mean error over {len(names)} corruptions {sum(errors) / len(names):.2%}, without any {clean:.2%}")
    if num_classes == 1000:
        relative = sum(e / CORRUPTIONS[n].alexnet for n, e in zip(names, errors, strict=True)) / len(names)
        missing = f"; the published number is over 15, of which {', '.join(NOT_OFFERED)} are not offered"
        say(f"mean corruption error, relative to AlexNet's, over these {len(names)}: {relative:.2%}{missing}")


def _say_temperature(args: argparse.Namespace, scores: "Scores", measured: "Measured") -> None:
    import torch

    from pipeline.models.evaluation_options import fit_temperature

    temperature, origin = args.temperature, "given"
    if args.fit_temperature:
        held = measured(args.fit_temperature)[1]
        assert held is not None
        temperature = fit_temperature(torch.from_numpy(held.logits), torch.from_numpy(held.labels))
        origin = f"fitted on {len(held.labels)} images of {args.fit_temperature}"
    logits, labels = torch.from_numpy(scores.logits).double(), torch.from_numpy(scores.labels)
    loss = float(torch.nn.functional.cross_entropy(logits / temperature, labels))
    say(f"at temperature {temperature:.4f} ({origin}): loss {loss:.4f}; accuracy stays")
