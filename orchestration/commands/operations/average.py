"""`normfree average`: one model out of the weights of several."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import doing, say
from orchestration.commands.parser import add, number
from pipeline.display import shell
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.export.averaging import Score
    from pipeline.export.source import ExportSource


def average_command(commands: Any) -> None:
    p = add(
        commands,
        "average",
        average,
        "one model out of the weights of several: checkpoints of a run, fine-tuned runs (soups), start and fine-tuned (WiSE-FT)",
        [
            "normfree average runs/c100 --last 5 --out averages/c100",
            "normfree average runs/ft1 runs/ft2 runs/ft3 --method greedy --data data/flowers --out averages/soup",
            "normfree average runs/zero runs/ft1 --method wise --data data/flowers --out averages/wise",
        ],
    )
    p.add_argument(
        "sources",
        metavar="CHECKPOINT",
        nargs="+",
        help="checkpoints or run folders (their newest ones), alike in everything but weights",
    )
    p.add_argument(
        "--out", required=True, metavar="URL", help="a new folder; it serves wherever a checkpoint is asked for"
    )
    p.add_argument(
        "--method",
        choices=["uniform", "greedy", "wise"],
        default="uniform",
        help="uniform: the mean (default); greedy: the best, and each of the others that does not lower its accuracy; wise: on "
        "the line from the first to the second, at the best of 11 places",
    )
    p.add_argument("--last", type=number(int, 2), metavar="N", help="of one run: its N newest checkpoints")
    p.add_argument(
        "--alpha", type=number(float, 0, 1), metavar="X", help="of wise: this place, 0 the first and 1 the second"
    )
    p.add_argument("--data", metavar="URL", help="a prepared dataset of the same classes, whose held-out split chooses")
    p.add_argument("--split", default="val", metavar="NAME", help="of --data; never test (default %(default)s)")
    p.add_argument("--weights", choices=["evaluated", "ema", "raw"], default="evaluated")
    p.add_argument("--license", default="", metavar="ID", help="for the model card, as in 'normfree export'")


def average(args: argparse.Namespace) -> int:
    from pipeline.export import averaging
    from pipeline.export.card_facts import CardFacts
    from pipeline.export.export import export_source, refuse_taken
    from pipeline.export.source import open_source

    if args.alpha is not None and args.method != "wise":
        raise UserError(f"--alpha is of --method wise, and the method is {args.method}; leave it out")
    if args.data is None and (args.method == "greedy" or (args.method == "wise" and args.alpha is None)):
        raise UserError(f"--method {args.method} chooses on held-out data; give them with --data")
    facts = CardFacts(license=args.license)
    refuse_taken(args.out)
    with doing("reading checkpoints"):
        members = [open_source(url, args.weights) for url in _sources(args)]
    measure, data = _held_out(args, members) if args.data else (None, None)
    with doing("averaging"):
        found = averaging.average(members, args.method, measure, alpha=args.alpha)
        made = export_source(
            found.source, "safetensors", args.out, 0.0, facts=facts, more={"average": found.facts | {"data": data}}
        )
    for one in found.facts["curve"]:
        say(f"alpha {one['alpha']:.1f}: top-1 {one['top1']:.2%}, loss {one['loss']:.4f}")
    for one in found.facts["members"]:
        score = "" if one["top1"] is None else f", top-1 {one['top1']:.2%}"
        say(f"{one['share']:6.1%}  {one['url']} (step {one['step']}{score})")
    if found.score:
        say(f"the average on {args.split} of {args.data}: top-1 {found.score.top1:.2%}, loss {found.score.loss:.4f}")
    say(f"made {made.url} ({args.method}, digest {made.digest[:12]})")
    say(
        f"next: normfree evaluate {shell([made.url])} DATA, or: normfree transfer {shell([made.url])} --suite SUITE ..."
    )
    return 0


def _sources(args: argparse.Namespace) -> list[str]:
    from pipeline.checkpoint.commit import committed

    if args.last is None:
        return list(args.sources)
    if len(args.sources) != 1:
        raise UserError(f"--last is of one run, and {len(args.sources)} are given; give one run folder")
    found = committed(args.sources[0])
    if len(found) < args.last:
        raise UserError(
            f"--last is {args.last}, and {args.sources[0]} has {len(found)} checkpoints; give a smaller number"
        )
    return found[: args.last]


def _held_out(
    args: argparse.Namespace, members: "list[ExportSource]"
) -> "tuple[Callable[[Any], Score], dict[str, str]]":
    """What measures a network, and on what, for the record. UserError for a split that may not choose."""
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.loading.datasets import DataConfig, EvalData
    from pipeline.distributed import join
    from pipeline.export.averaging import Score
    from pipeline.training.evaluate import evaluate
    from transfer.protocol import imagenet_labels

    first = members[0]
    digest = Manifest.open(args.data).digest
    for member in members:
        refuse_split(args.split, digest, member.commit.dataset, member.commit.config)
    data = EvalData(DataConfig(url=args.data, eval_split=args.split), first.augment)
    if not imagenet_labels.is_same(data.manifest.outputs, first.commit.classes):
        raise UserError(
            f"{args.data} has other classes than {first.commit.url}; give the dataset that it was trained on"
        )
    world = join()

    def measure(network: Any) -> Score:
        found = evaluate(
            network.to(world.device), data, first.augment, world=world, batch_size=256, step=0, weights=args.weights
        )
        assert found is not None  # nobody can give it up
        network.to("cpu")
        return Score(top1=found.top1, loss=found.loss)

    return measure, {"url": args.data, "name": data.manifest.name, "digest": data.manifest.digest, "split": args.split}


def refuse_split(split: str, digest: str, trained_on: dict[str, Any], config: dict[str, Any]) -> None:
    """UserError where a choice would be made on a test split, or on the images that the weights were trained on."""
    if split == "test":
        raise UserError(
            "nothing is chosen on a test split; give another with --split, or make one with data prepare --val-share"
        )
    if digest == trained_on.get("digest") and split == config.get("data", {}).get("train_split", "train"):
        raise UserError(
            f"the checkpoint was trained on {split} of these data, so it cannot choose there; give another split"
        )
