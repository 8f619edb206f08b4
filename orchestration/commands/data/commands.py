"""`normfree data`: prepare, index, cards; the rest is in the modules next to this one."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from orchestration.child_process import cores
from orchestration.commands.data.checks import add_overlap, add_verify
from orchestration.commands.data.parts import add_parts, part_of, spread
from orchestration.commands.data.rates import add_bench, add_plan
from orchestration.commands.output import progress_bar, say
from orchestration.commands.parser import add
from pipeline.display import shell
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.format.manifest import Manifest


def data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="datasets: prepare, index, verify, overlap, bench, cards")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    _data_prepare(actions)
    _data_index(actions)
    add_verify(actions)
    add_overlap(actions)
    add_bench(actions)
    add_plan(actions)
    add(actions, "cards", data_cards, "list the catalogue", ["normfree data cards"])


def _data_prepare(actions: Any) -> None:
    p = add(
        actions,
        "prepare",
        data_prepare,
        "raw images -> WebDataset shards and a manifest; the same command again goes on where it was killed",
        [
            "normfree data prepare glyphs --out data/glyphs",
            "normfree data prepare cifar100 --source cifar100.tar --out data/cifar100",
            "normfree data prepare flowers --source photos.zip --val-share 0.2 --out s3://bucket/flowers",
            "normfree data prepare imagenet --source ILSVRC2012/ --resize-shortest 512 --out data/imagenet",
            "normfree data prepare images --source photos.csv --out data/photos",
            "normfree data prepare images --source tagged.csv --multi-label '|' --out data/tagged",
            "normfree data prepare images --source photos.csv --out /shared/photos --part 3/64",
            "normfree data prepare images --source photos.csv --out /shared/photos --merge",
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
    p.add_argument(
        "--multi-label",
        metavar="SEPARATOR",
        help="an image has several labels, with this between them in a list's cell, or as a list in JSONL and parquet; ?LABEL "
        "leaves open whether it is shown (default: as the card says)",
    )
    p.add_argument(
        "--allow-root",
        action="append",
        metavar="PLACE",
        help="folder or address (s3://bucket/photos, https://host/photos) that a list may name, besides what lies next to or "
        "below the list itself; may be given again",
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
    add_parts(p)


def data_prepare(args: argparse.Namespace) -> int:
    from pipeline.data.prepare.prepare import Preparation
    from pipeline.data.prepare.reencode import Reencode
    from pipeline.data.sources.cards import load_card

    card = load_card(args.card)
    if args.multi_label is not None:
        card = card.with_several_labels(args.multi_label)
    reencode = Reencode(
        shortest_px=args.resize_shortest, longest_px=args.resize_longest, jpeg_quality=args.jpeg_quality
    )
    part = part_of(args)
    with progress_bar(card.name, "images") as update, spread(args) as run_each:
        preparation = Preparation(
            card=card,
            out=args.out,
            source=args.source,
            splits=args.splits.split(",") if args.splits else None,
            val_share=args.val_share,
            allow_roots=args.allow_root or (),
            shard_bytes=int(args.shard_mb * 1e6),
            shard_samples=args.shard_samples,
            max_bad_share=args.max_bad_share,
            seed=args.seed,
            reencode=reencode,
            workers=args.workers or cores(),
            run_each=run_each,
            progress=update,
        )
        made = preparation.run(merge=args.merge) if part is None else preparation.run_part(part)
    if isinstance(made, int):
        say(f"part {part} is done: {made} shards; when all are: the same command with --merge in place of --part")
    else:
        _print_dataset(made, args.out)
    return 0


def _data_index(actions: Any) -> None:
    p = add(
        actions,
        "index",
        data_index,
        "adopt existing WebDataset tars: a manifest next to them; the tars are not touched",
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
    add_parts(p)


def data_index(args: argparse.Namespace) -> int:
    from pipeline.data.prepare.adopt import adopt
    from pipeline.data.sources.csv_jsonl import read_classes

    splits: dict[str, str] = {}
    for text in args.split or []:
        name, equals, pattern = text.partition("=")
        if not equals or not pattern:
            raise UserError(f"--split {text}: give NAME=PATTERN, as in --split train='train-*.tar'")
        splits[name] = pattern
    part = part_of(args)
    with progress_bar("indexing", "tars") as update, spread(args) as run_each:
        manifest = adopt(
            args.url,
            splits=splits or None,
            classes=read_classes(args.classes) if args.classes else None,
            label_field=args.label_field,
            name=args.name,
            max_bad_share=args.max_bad_share,
            workers=args.workers or cores(),
            run_each=run_each,
            part=part,
            merge=args.merge,
            progress=lambda done, total: update("", done, total),
        )
    if manifest is None:
        say(f"part {part} is done; when all are: the same command with --merge in place of --part")
    else:
        _print_dataset(manifest, manifest.url)
    return 0


def data_cards(_args: argparse.Namespace) -> int:
    from pipeline.data.sources.cards import list_cards, load_card

    for name in list_cards():
        card = load_card(name)
        say(f"{name:16} {card.num_classes or '?':>5} classes  {card.kind:11} {card.title}")
    return 0


def _print_dataset(manifest: Manifest, url: str) -> None:
    what = f"labels ({manifest.num_classes} sets of them occur)" if manifest.labels else "classes"
    for name, split in manifest.splits.items():
        shards = "1 shard" if split.num_shards == 1 else f"{split.num_shards} shards"
        say(f"{name}: {split.num_samples} images of {len(manifest.outputs)} {what} in {shards}")
    if manifest.source_note:
        say(f"note: {manifest.source_note}")
    if skipped := manifest.skipped:
        reasons = Counter(entry.reason for entry in skipped)
        say(f"skipped: {len(skipped)} images, listed in skipped.jsonl")
        say(*(f"  {num} x {reason}" for reason, num in reasons.most_common(5)))
    say(f"made {url} (digest {manifest.digest[:12]})")
    say(f"next: normfree {_next(manifest, shell([url]))}")


def _next(manifest: Manifest, url: str) -> str:
    if manifest.masks or manifest.boxes:  # an image has no class to train on
        return f"transfer CHECKPOINT --data {url} --out SWEEP"
    if "train" not in manifest.splits:
        return f"evaluate CHECKPOINT {url}"
    return f"pretrain RECIPE --data.url {url}{' --optim.loss binary' if manifest.labels else ''} --out RUN"


def _bad_share(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--max-bad-share",
        type=float,
        default=0.001,
        metavar="X",
        help="stop if more than this share of images cannot be used (default %(default)s); those skipped are listed",
    )
