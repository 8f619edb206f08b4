"""Arguments of `normfree data`."""

from __future__ import annotations

import argparse
from typing import Any

from orchestration.arguments.parser import add


def data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="datasets: prepare, index, verify, overlap, bench, cards")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    _data_prepare(actions)
    _data_index(actions)
    p = add(
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
    add(actions, "cards", "data_cards", "list the catalogue", ["normfree data cards"])


def _data_prepare(actions: Any) -> None:
    p = add(
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
    p = add(
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
    p = add(
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
    p = add(
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
