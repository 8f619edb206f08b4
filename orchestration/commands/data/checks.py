"""`normfree data verify` and `overlap`."""

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestration.child_process import cores
from orchestration.commands.data.parts import add_parts, result_of, spread
from orchestration.commands.output import progress_bar, say, warn
from orchestration.commands.parser import add, number

if TYPE_CHECKING:
    from pipeline.data.parts import Part
    from pipeline.data.verify.overlap import Overlap
    from pipeline.data.verify.verify import Verification


def add_verify(actions: Any) -> None:
    p = add(
        actions,
        "verify",
        data_verify,
        "check every byte and every image of a dataset against its manifest",
        [
            "normfree data verify data/cifar100",
            "normfree data verify s3://bucket/imagenet --workers 16",
            "normfree data verify s3://bucket/imagenet --part 3/64 --results s3://bucket/checks",
        ],
    )
    p.add_argument("url", metavar="URL")
    add_parts(p, has_results=True)


def data_verify(args: argparse.Namespace) -> int:
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.verify.verify import Verification, merged

    work = f"verify {Manifest.open(args.url).digest}"
    found = result_of(args, work, Verification, partial(_verify, args), merged)
    counts = f"{found.num_shards} shards, {found.num_samples} samples, {found.num_bytes} bytes"
    if found.problems:
        say(*found.problems)
        warn(
            f"normfree: {args.url} does not match its manifest in {len(found.problems)} places (of {counts}); restore the "
            "shards named above, or prepare the dataset again"
        )
        return 1
    say(f"{args.url}: {counts} match the manifest; every image decodes")
    return 0


def _verify(args: argparse.Namespace, part: "Part | None") -> "Verification":
    from pipeline.data.verify.verify import verify

    with progress_bar("verifying", "shards") as update, spread(args) as run_each:
        return verify(
            args.url,
            workers=args.workers or cores(),
            run_each=run_each,
            part=part,
            progress=lambda done, total: update("", done, total),
        )


def add_overlap(actions: Any) -> None:
    p = add(
        actions,
        "overlap",
        data_overlap,
        "which images of B (a test split) are in A (an upstream set), also re-encoded or resized",
        [
            "normfree data overlap data/imagenet data/flowers --out flowers_in_imagenet.csv",
            "normfree data overlap s3://bucket/up data/cifar10 --split-b val --radius 4 --out pairs.json",
            "normfree data overlap s3://bucket/up data/cifar10 --part 3/64 --results s3://bucket/pairs",
            "normfree data overlap s3://bucket/up data/cifar10 --merge --results s3://bucket/pairs --out pairs.csv",
        ],
    )
    p.add_argument("a", metavar="A", help="a prepared or indexed dataset")
    p.add_argument("b", metavar="B", help="another")
    p.add_argument("--split-a", metavar="A,B", help="splits of A (default: all)")
    p.add_argument("--split-b", metavar="A,B", help="splits of B (default: test, else val)")
    p.add_argument(
        "--radius", type=number(int, 0, 64), default=6, metavar="BITS", help="of 64-bit hashes (default %(default)s)"
    )
    p.add_argument("--no-confirm", action="store_true", help="trust the hashes: do not read and compare the images")
    p.add_argument("--show", type=number(int, 0), default=20, metavar="N", help="pairs to print (default %(default)s)")
    p.add_argument("--out", metavar="FILE", help="all pairs as .csv or .json")
    add_parts(p, has_results=True)


def data_overlap(args: argparse.Namespace) -> int:
    from pipeline.data.verify.overlap import Overlap, merged
    from pipeline.storage import objects

    work = f"overlap {args.a} {args.b} {args.split_a} {args.split_b} {args.radius} {args.no_confirm}"
    found = result_of(args, work, Overlap, partial(_overlap, args), merged)
    for pair in found.pairs[: args.show]:
        say(f"{pair.kind:8} {pair.distance:2} bits  {pair.split_a}/{pair.key_a}  {pair.split_b}/{pair.key_b}")
    if len(found.pairs) > args.show:
        say(f"... and {len(found.pairs) - args.show} pairs more{'' if args.out else '; --out FILE holds all'}")
    share = found.num_b_found / max(1, found.num_b)
    kinds = {
        kind: sum(pair.kind == kind for pair in found.pairs)
        for kind in ("bytes", "pixels", "similar", "mirrored", "hash")
    }
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


def _overlap(args: argparse.Namespace, part: "Part | None") -> "Overlap":
    from pipeline.data.process_pool import each
    from pipeline.data.verify.overlap import overlap

    with progress_bar("comparing", "pairs") as update, spread(args) as run_each:
        return overlap(
            args.a,
            args.b,
            splits_a=args.split_a.split(",") if args.split_a else None,
            splits_b=args.split_b.split(",") if args.split_b else None,
            radius=args.radius,
            confirm=not args.no_confirm,
            run_each=run_each or partial(each, num_workers=args.workers or 1),
            part=part,
            progress=lambda done, total: update("", done, total),
        )
