"""`normfree data`: prepare, index, verify, overlap, bench, cards."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import cores, progress_bar, say
from orchestration.commands.parser import add
from pipeline.display import terminal
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.format.manifest import Manifest


def data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="datasets: prepare, index, verify, overlap, bench, cards")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    _data_prepare(actions)
    _data_index(actions)
    p = add(
        actions,
        "verify",
        data_verify,
        "check every byte and every image of a dataset against its manifest",
        ["normfree data verify data/cifar100", "normfree data verify s3://bucket/imagenet --workers 16"],
    )
    p.add_argument("url", metavar="URL")
    _workers(p)
    _data_overlap(actions)
    _data_bench(actions)
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
        "--allow-root",
        action="append",
        metavar="PLACE",
        help="folder or address (s3://bucket/photos, https://host/photos) that a list may name, beside what lies beside or "
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
    _workers(p)


def data_prepare(args: argparse.Namespace) -> int:
    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.prepare.reencode import Reencode
    from pipeline.data.sources.cards import load_card

    card = load_card(args.card)
    reencode = Reencode(
        shortest_px=args.resize_shortest, longest_px=args.resize_longest, jpeg_quality=args.jpeg_quality
    )
    with progress_bar(card.name, "images") as update:
        manifest = prepare(
            card,
            args.out,
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
            progress=update,
        )
    _say_dataset(manifest, args.out)
    return 0


def _data_index(actions: Any) -> None:
    p = add(
        actions,
        "index",
        data_index,
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


def data_index(args: argparse.Namespace) -> int:
    from pipeline.data.prepare.adopt import adopt
    from pipeline.data.sources.csv_jsonl import read_classes

    splits: dict[str, str] = {}
    for text in args.split or []:
        name, equals, pattern = text.partition("=")
        if not equals or not pattern:
            raise UserError(f"--split {text}: give NAME=PATTERN, as in --split train='train-*.tar'")
        splits[name] = pattern
    with progress_bar("indexing", "tars") as update:
        manifest = adopt(
            args.url,
            splits=splits or None,
            classes=read_classes(args.classes) if args.classes else None,
            label_field=args.label_field,
            name=args.name,
            max_bad_share=args.max_bad_share,
            workers=args.workers or cores(),
            progress=lambda done, total: update("", done, total),
        )
    _say_dataset(manifest, manifest.url)
    return 0


def data_verify(args: argparse.Namespace) -> int:
    from pipeline.data.verify.verify import verify

    with progress_bar("verifying", "shards") as update:
        found = verify(args.url, workers=args.workers or cores(), progress=lambda done, total: update("", done, total))
    counts = f"{found.num_shards} shards, {found.num_samples} samples, {found.num_bytes} bytes"
    if found.problems:
        say(*found.problems)
        print(
            terminal(
                f"normfree: {args.url} does not match its manifest in {len(found.problems)} places (of {counts}); restore "
                "the shards named above, or prepare the dataset again"
            ),
            file=sys.stderr,
        )
        return 1
    say(f"{args.url}: {counts} match the manifest; every image decodes")
    return 0


def _data_overlap(actions: Any) -> None:
    p = add(
        actions,
        "overlap",
        data_overlap,
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


def data_overlap(args: argparse.Namespace) -> int:
    from pipeline.data.verify.overlap import overlap
    from pipeline.storage import objects

    with progress_bar("comparing", "pairs") as update:
        found = overlap(
            args.a,
            args.b,
            splits_a=args.split_a.split(",") if args.split_a else None,
            splits_b=args.split_b.split(",") if args.split_b else None,
            radius=args.radius,
            confirm=not args.no_confirm,
            progress=lambda done, total: update("", done, total),
        )
    for pair in found.pairs[: args.show]:
        say(f"{pair.kind:8} {pair.distance:2} bits  {pair.split_a}/{pair.key_a}  {pair.split_b}/{pair.key_b}")
    if len(found.pairs) > args.show:
        say(f"... and {len(found.pairs) - args.show} pairs more{'' if args.out else '; --out FILE holds all'}")
    share = found.num_b_found / max(1, found.num_b)
    kinds = {kind: sum(pair.kind == kind for pair in found.pairs) for kind in ("bytes", "pixels", "similar", "hash")}
    say(
        f"{found.num_b_found} of {found.num_b} images of {args.b} ({share:.2%}) are among the {found.num_a} of {args.a}",
        "pairs: " + (", ".join(f"{num} {kind}" for kind, num in kinds.items() if num) or "none"),
    )
    if found.num_flat_b:
        say(f"not compared: {found.num_flat_b} images of {args.b} of one colour")
    if found.num_unlisted:
        say(f"not looked at: {found.num_unlisted} pairs of images that have too many look-alikes")
    if args.out:
        objects.write_bytes(args.out, found.to_json() if args.out.endswith(".json") else found.to_csv())
        say(f"made {args.out}")
    return 0


def _data_bench(actions: Any) -> None:
    p = add(
        actions,
        "bench",
        data_bench,
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


def data_bench(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pipeline.data.augment.augment_config import AugmentConfig
    from pipeline.data.loading.benchmark import bare_read, measure
    from pipeline.data.loading.datasets import DataConfig

    try:
        counts = [int(word) for word in args.workers.split(",")]
    except ValueError:
        raise UserError(f"--workers is {args.workers!r}; write numbers with commas between, as 0,1,2") from None
    augment = AugmentConfig(image_px=args.px)
    config = DataConfig(url=args.url, train_split=args.split, cache_gb=args.cache_gb)
    table = Table(title=f"{args.url}, {args.split}, {args.px} px, batches of {args.batch}")
    for name in ("", "images/s", "MB/s", "first batch s", "wait", "read", "decode"):
        table.add_column(name, justify="right")
    bare = bare_read(config, seconds=args.seconds)
    table.add_row("bare read", f"{bare.images_per_s:,.0f}", f"{bare.mb_per_s:.1f}", *[""] * 4)
    best = None
    for count in counts:
        row = measure(config, augment, num_workers=count, batch=args.batch, seconds=args.seconds)
        shares = (f"{share:.0%}" for share in (row.wait_share, row.read_share, row.decode_share))
        table.add_row(
            f"{count} workers", f"{row.images_per_s:,.0f}", f"{row.mb_per_s:.1f}", f"{row.first_batch_s:.2f}", *shares
        )
        best = row if best is None or row.images_per_s > best.images_per_s else best
    Console().print(table)
    say(
        "wait: of the time, waiting for a batch; read, decode: of a loader process's time, waiting for bytes, making pixels"
    )
    assert best is not None
    limit = "decoding" if best.decode_share > best.read_share else "reading"
    say(
        f"best with {best.num_workers} workers: {best.images_per_s:,.0f} images/s, "
        f"{best.mb_per_s / max(bare.mb_per_s, 1e-9):.0%} of the bare read; {limit} is what bounds it"
    )
    say(
        f"next: normfree pretrain RECIPE --data.url {shlex.quote(args.url)} --data.num_workers {best.num_workers} --out RUN"
    )
    return 0


def data_cards(_args: argparse.Namespace) -> int:
    from pipeline.data.sources.cards import list_cards, load_card

    for name in list_cards():
        card = load_card(name)
        say(f"{name:16} {card.num_classes or '?':>5} classes  {card.kind:11} {card.title}")
    return 0


def _say_dataset(manifest: Manifest, url: str) -> None:
    for name, split in manifest.splits.items():
        shards = "1 shard" if len(split.shards) == 1 else f"{len(split.shards)} shards"
        say(f"{name}: {split.num_samples} images of {manifest.num_classes} classes in {shards}")
    if manifest.source_note:
        say(f"note: {manifest.source_note}")
    if manifest.skipped:
        reasons = Counter(entry.reason for entry in manifest.skipped)
        say(f"left out: {len(manifest.skipped)} images, listed in the manifest")
        say(*(f"  {num} x {reason}" for reason, num in reasons.most_common(5)))
    say(f"made {url} (digest {manifest.digest[:12]})")
    if "train" in manifest.splits:
        say(f"next: normfree pretrain RECIPE --data.url {shlex.quote(url)} --out RUN")
    else:
        say(f"next: normfree evaluate CHECKPOINT {shlex.quote(url)}")


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
