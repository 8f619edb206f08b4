"""`normfree data bench` and `plan`: what a dataset gives, measured and foretold."""

import argparse
from typing import Any

from orchestration.commands.output import say
from orchestration.commands.parser import add, number
from pipeline.display import shell
from pipeline.errors import UserError


def add_bench(actions: Any) -> None:
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
    p.add_argument(
        "--px", type=number(int, 1, 8192), default=224, help="side of the training images (default %(default)s)"
    )
    p.add_argument("--batch", type=number(int, 1), default=64, help="images of a batch (default %(default)s)")
    p.add_argument(
        "--seconds", type=number(float, 0.1), default=5, help="to measure for, each time (default %(default)s)"
    )
    p.add_argument("--cache-gb", type=number(float, 0), default=0, help="shard cache for object stores (default none)")


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
        f"next: normfree pretrain RECIPE --data.url {shell([args.url])} --data.num_workers {best.num_workers} --out RUN"
    )
    return 0


def add_plan(actions: Any) -> None:
    p = add(
        actions,
        "plan",
        data_plan,
        "what reading a dataset in lanes will cost and how well it mixes, before anything is read",
        [
            "normfree data plan --samples 300e6 --sample-kb 100 --hosts 64 --ranks 8 --batch 4096",
            "normfree data plan data/cifar100 --hosts 1 --ranks 2 --batch 128 --block-mb 0.02",
        ],
    )
    p.add_argument("url", metavar="URL", nargs="?", help="a dataset: its sizes, and how its classes lie in its shards")
    p.add_argument("--split", default="train")
    p.add_argument(
        "--samples",
        type=number(float, 1, 1e15),
        metavar="N",
        help="without a dataset: so many, in shards shuffled when written",
    )
    p.add_argument(
        "--sample-kb",
        type=number(float, 0.001, 1e9),
        default=100.0,
        help="of an image, without a dataset (default %(default)s)",
    )
    p.add_argument("--hosts", type=number(int, 1, 1 << 20), default=1)
    p.add_argument("--ranks", type=number(int, 1, 1 << 20), default=8, help="of each host (default %(default)s)")
    p.add_argument(
        "--batch",
        type=number(int, 1, 1 << 30),
        default=4096,
        help="different images in a global batch (default %(default)s)",
    )
    p.add_argument("--lanes", type=number(int, 0, 1 << 20), default=0, help="data.lanes (default: as a run chooses)")
    p.add_argument(
        "--lane-blocks", type=number(int, 1, 1 << 20), default=16, help="data.lane_blocks (default %(default)s)"
    )
    p.add_argument("--block-mb", type=number(float, 1e-6, 1e6), default=4.0, help="data.block_mb (default %(default)s)")
    p.add_argument(
        "--images-per-s", type=number(float, 1e-6, 1e9), default=1000.0, help="of a rank (default %(default)s)"
    )
    p.add_argument("--price-per-1000-requests", type=number(float, 0, 1e9), metavar="PRICE", help="of the store")


def data_plan(args: argparse.Namespace) -> int:
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.loading.data_plan import class_variance_between_blocks, describe_plan
    from pipeline.data.loading.data_plan import data_plan as plan_of
    from pipeline.data.sampling.lanes import choose_layout

    if (args.url is None) == (args.samples is None):
        raise UserError("a plan is of a dataset or of a number of images: give either URL or --samples")
    index = Manifest.open(args.url).split(args.split) if args.url else None
    num = index.num_samples if index else int(args.samples)
    sample_bytes = index.num_bytes / num if index else args.sample_kb * 1e3
    block_samples = max(1, round(args.block_mb * 1e6 / sample_bytes))
    layout = choose_layout(
        num, block_samples=block_samples, lanes=args.lanes, window=args.lane_blocks, batch=args.batch
    )
    if layout is None:
        say(
            f"{num:,} images are too few for lanes of blocks of {args.block_mb:g} MB: a run shuffles them whole, and "
            "every host reads all of them"
        )
        return 0
    between = class_variance_between_blocks(index.label, layout.block_samples) if index else None
    found = plan_of(
        layout,
        batch=args.batch,
        num_hosts=args.hosts,
        ranks_per_host=args.ranks,
        sample_bytes=sample_bytes,
        samples_per_s=args.images_per_s * args.hosts * args.ranks,
        between_blocks=between or 0.0,
    )
    say(
        f"{num:,} images of {sample_bytes / 1e3:.0f} KB, {args.hosts} hosts of {args.ranks} ranks, "
        f"global batch {args.batch}",
        *describe_plan(layout, found, between_blocks=between),
    )
    if args.price_per_1000_requests is not None:
        say(f"price      {found.requests / 1000 * args.price_per_1000_requests:,.2f} an epoch for requests")
    if found.excess_variance > 1.1:
        say("next: prepare the dataset anew, which shuffles, or raise --lanes or --lane-blocks")
    if found.amplification > 1.1:
        say(f"next: raise data.lanes to {2 * args.hosts} or more: several hosts read the same lanes")
    return 0
