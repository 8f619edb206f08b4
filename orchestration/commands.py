"""What each command does: reads its arguments, calls the floor below, prints what was made, where, and what comes next."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest


def _say(*lines: str) -> None:
    print(*lines, sep="\n")


def data_prepare(args: argparse.Namespace) -> int:
    from pipeline.data.cards import load_card
    from pipeline.data.prepare import prepare
    from pipeline.data.reencode import Reencode

    card = load_card(args.card)
    reencode = Reencode(
        shortest_px=args.resize_shortest, longest_px=args.resize_longest, jpeg_quality=args.jpeg_quality
    )
    with _progress_bar(card.name, "images") as update:
        manifest = prepare(
            card,
            args.out,
            source=args.source,
            splits=args.splits.split(",") if args.splits else None,
            val_share=args.val_share,
            shard_bytes=int(args.shard_mb * 1e6),
            shard_samples=args.shard_samples,
            max_bad_share=args.max_bad_share,
            seed=args.seed,
            reencode=reencode,
            workers=args.workers or _cores(),
            progress=update,
        )
    _say_dataset(manifest, args.out)
    return 0


def data_index(args: argparse.Namespace) -> int:
    from pipeline import storage
    from pipeline.data.adopt import adopt

    splits: dict[str, str] = {}
    for text in args.split or []:
        name, equals, pattern = text.partition("=")
        if not equals or not pattern:
            raise UserError(f"--split {text}: give NAME=PATTERN, as in --split train='train-*.tar'")
        splits[name] = pattern
    classes = None
    if args.classes:
        if not storage.exists(args.classes):
            raise UserError(f"no file {args.classes}; --classes wants one class name a line, in label order")
        classes = [line.strip() for line in storage.read_bytes(args.classes).decode().splitlines() if line.strip()]
    with _progress_bar("indexing", "tars") as update:
        manifest = adopt(
            args.url,
            splits=splits or None,
            classes=classes,
            label_field=args.label_field,
            name=args.name,
            max_bad_share=args.max_bad_share,
            workers=args.workers or _cores(),
            progress=lambda done, total: update("", done, total),
        )
    _say_dataset(manifest, manifest.url)
    return 0


def data_verify(args: argparse.Namespace) -> int:
    from pipeline.data.verify import verify

    with _progress_bar("verifying", "shards") as update:
        found = verify(args.url, workers=args.workers or _cores(), progress=lambda done, total: update("", done, total))
    counts = f"{found.num_shards} shards, {found.num_samples} samples, {found.num_bytes} bytes"
    if found.problems:
        _say(*found.problems)
        print(
            f"normfree: {args.url} does not match its manifest in {len(found.problems)} places (of {counts}); restore the "
            "shards named above, or prepare the dataset again",
            file=sys.stderr,
        )
        return 1
    _say(f"{args.url}: {counts} match the manifest; every image decodes")
    return 0


def data_overlap(args: argparse.Namespace) -> int:
    from pipeline import storage
    from pipeline.data.overlap import overlap

    with _progress_bar("comparing", "pairs") as update:
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
        _say(f"{pair.kind:8} {pair.distance:2} bits  {pair.split_a}/{pair.key_a}  {pair.split_b}/{pair.key_b}")
    if len(found.pairs) > args.show:
        _say(f"... and {len(found.pairs) - args.show} pairs more{'' if args.out else '; --out FILE holds all'}")
    share = found.num_b_found / max(1, found.num_b)
    kinds = {kind: sum(pair.kind == kind for pair in found.pairs) for kind in ("bytes", "pixels", "similar", "hash")}
    _say(
        f"{found.num_b_found} of {found.num_b} images of {args.b} ({share:.2%}) are among the {found.num_a} of {args.a}",
        "pairs: " + (", ".join(f"{num} {kind}" for kind, num in kinds.items() if num) or "none"),
    )
    if found.num_flat_b:
        _say(f"not compared: {found.num_flat_b} images of {args.b} of one colour")
    if found.num_unlisted:
        _say(f"not looked at: {found.num_unlisted} pairs of images that have too many look-alikes")
    if args.out:
        storage.write_bytes(args.out, found.to_json() if args.out.endswith(".json") else found.to_csv())
        _say(f"made {args.out}")
    return 0


def _say_dataset(manifest: Manifest, url: str) -> None:
    for name, split in manifest.splits.items():
        shards = "1 shard" if len(split.shards) == 1 else f"{len(split.shards)} shards"
        _say(f"{name}: {split.num_samples} images of {manifest.num_classes} classes in {shards}")
    if manifest.source_note:
        _say(f"note: {manifest.source_note}")
    if manifest.skipped:
        reasons = Counter(entry.reason for entry in manifest.skipped)
        _say(f"left out: {len(manifest.skipped)} images, listed in the manifest")
        _say(*(f"  {num} x {reason}" for reason, num in reasons.most_common(5)))
    _say(f"made {url} (digest {manifest.digest[:12]})")
    if "train" in manifest.splits:
        _say(f"next: normfree pretrain RECIPE --data.url {shlex.quote(url)} --out RUN")
    else:
        _say(f"next: normfree evaluate CHECKPOINT {shlex.quote(url)}")


@contextlib.contextmanager
def _progress_bar(title: str, unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, nothing elsewhere; gives update(phase, done, total)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[unit]}")]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=None, unit=unit)

        def update(phase: str, done: int, total: int) -> None:
            files = phase == "copying"
            description = f"{title}: {phase}" if phase else title
            progress.update(task, description=description, completed=done, total=total, unit="files" if files else unit)

        yield update


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def data_bench(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pipeline.data.augment import AugmentConfig
    from pipeline.data.bench import bare_read, measure
    from pipeline.data.loader import DataConfig

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
    _say(
        "wait: of the time, waiting for a batch; read, decode: of a loader process's time, waiting for bytes, making pixels"
    )
    assert best is not None
    limit = "decoding" if best.decode_share > best.read_share else "reading"
    _say(
        f"best with {best.num_workers} workers: {best.images_per_s:,.0f} images/s, "
        f"{best.mb_per_s / max(bare.mb_per_s, 1e-9):.0%} of the bare read; {limit} is what bounds it"
    )
    _say(
        f"next: normfree pretrain RECIPE --data.url {shlex.quote(args.url)} --data.num_workers {best.num_workers} --out RUN"
    )
    return 0


def data_cards(args: argparse.Namespace) -> int:
    from pipeline.data.cards import list_cards, load_card

    for name in list_cards():
        card = load_card(name)
        _say(f"{name:16} {card.num_classes or '?':>5} classes  {card.kind:11} {card.title}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    from orchestration.inspection import inspect as run

    return run(args)


def pretrain(args: argparse.Namespace) -> int:
    from orchestration.launch.local import pretrain as launch
    from pipeline import recipes, storage
    from pipeline.config import dump_yaml, load_yaml, override

    if args.list:
        _say(*recipes.listing())
        return 0
    if args.recipe is None:
        raise UserError("no recipe: give the name of one ('normfree pretrain --list' prints them) or a FILE.yaml")
    header = ""
    if args.recipe.endswith((".yaml", ".yml")):
        if not storage.exists(args.recipe):
            raise UserError(f"no file {args.recipe}; give the path of a Run in YAML, or a recipe's name")
        run = load_yaml(storage.read_bytes(args.recipe).decode(), args.recipe)
    else:
        recipe = recipes.find(args.recipe)
        run, header = recipe.make(), "".join(f"# {line}".rstrip() + "\n" for line in recipe.header.splitlines())
    run = override(run, args.fields)
    if args.show:
        _say(header + dump_yaml(run))
        return 0
    if not args.out:
        raise UserError("no run folder: set --out to where checkpoints and records go")
    if args.num_processes < 1:
        raise UserError(f"--num-processes is {args.num_processes}; set it to 1 or more")
    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return launch(run, args.out, num_processes=args.num_processes, tracking_uri=uri, debug=args.debug)


def evaluate(args: argparse.Namespace) -> int:
    from pipeline.backbone import load_backbone
    from pipeline.data.loader import DataConfig, EvalData
    from pipeline.data.manifest import Manifest
    from pipeline.evaluate import Scores
    from pipeline.evaluate import evaluate as measure
    from pipeline.world import join
    from transfer import imagenet_labels

    loaded = load_backbone(args.checkpoint, args.weights)
    split = args.split or ("val" if "val" in Manifest.open(args.data).splits else "test")
    data = EvalData(DataConfig(url=args.data, eval_split=split), loaded.augment)
    if not imagenet_labels.is_same(data.manifest.classes, loaded.classes):
        raise UserError(
            f"{args.data} has other classes than the checkpoint was trained on; use 'normfree transfer' for a new task"
        )
    real_labels = args.real_labels or ""
    beside = imagenet_labels.find_beside(data.manifest, split, real_labels=real_labels, v2="", data_root=".")
    world, kept = join(), list[Scores]()
    if real_labels and world.size > 1:
        raise UserError("--real-labels needs all scores in one process; run normfree evaluate without torchrun")
    result = measure(
        loaded.model.to(world.device),
        data,
        loaded.augment,
        world=world,
        batch_size=256,
        step=0,
        weights=args.weights,
        on_scores=kept.append if real_labels else None,
    )
    assert result is not None  # nobody can give it up
    real = ""
    if real_labels:
        found = imagenet_labels.real_top1(beside.real_url, args.data, split, kept[0].samples, kept[0].logits)
        real = f"ReaL {found:.2%}, "
    _say(
        f"{loaded.url} on {split} of {args.data}: top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, "
        f"{real}loss {result.loss:.4f}, {result.num_samples} images"
    )
    return 0


def export(args: argparse.Namespace) -> int:
    from orchestration.export_run import export_run

    return export_run(args)


def classify(args: argparse.Namespace) -> int:
    from orchestration.export_run import classify_run

    return classify_run(args)


def transfer(args: argparse.Namespace) -> int:
    from orchestration.transfer_run import transfer_run

    return transfer_run(args)


def report(args: argparse.Namespace) -> int:
    from pipeline import storage
    from transfer.report import write_report

    if args.rerun:
        return _rerun(args)
    out = args.out or storage.join(args.sweep[0], "report")
    paths = write_report(args.sweep, out, overlaps=args.overlap, data_root=args.data_root or "")
    _say(*(f"{kind}: {path}" for kind, path in paths.items()))
    return 0


def _rerun(args: argparse.Namespace) -> int:
    """Exit code: 0 the new mean lies in the recorded interval, 1 it does not."""
    from transfer.findings import load_findings
    from transfer.rerun import rerun

    if len(args.sweep) > 1:
        raise UserError(
            f"--rerun {args.rerun} wants one sweep folder, not {len(args.sweep)}; name the one that has the cell"
        )
    (folder,) = load_findings(args.sweep[0]).folders
    found = rerun(folder, args.rerun, data_root=args.data_root or "", tell=_say)
    _say(*found.differences)
    recorded, again = found.recorded, found.again
    assert recorded.low is not None and recorded.high is not None
    _say(
        f"{found.cell}: {again.mean:.4f} now; recorded {recorded.mean:.4f}, interval {recorded.low:.4f} to "
        f"{recorded.high:.4f} over {recorded.n} seeds",
        "it lands in the recorded interval" if found.lands else "it does NOT land in the recorded interval",
    )
    return 0 if found.lands else 1


def pull(args: argparse.Namespace) -> int:
    from orchestration import registry
    from pipeline import storage
    from pipeline.pull import pull as fetch

    if args.connections < 1:
        raise UserError(f"--connections is {args.connections}; set it to 1 or more")
    url, digest = args.url, None
    name = url.rstrip("/").rpartition("/")[2] or "checkpoint"
    if registry.is_name(url):
        version = registry.find(url, args.tracking_uri)
        url, digest, name = version.source, version.digest, version.name
    out = args.to or name
    if args.format and storage.list_urls(out):
        raise UserError(f"{out} is not empty; give another folder with --to")
    to = f"{out.rstrip('/')}.checkpoint" if args.format else out
    with _progress_bar("pulling", "bytes") as update:
        made = fetch(
            url, to, digest=digest, connections=args.connections, progress=lambda there, total: update("", there, total)
        )
    _say(*(f"passed over  {bad.url}: {bad.reason}" for bad in made.passed))
    files = made.commit.files
    _say(
        f"made {to}: step {made.commit.step} of {made.commit.url}, {len(files)} files, {made.commit.size_bytes:,} bytes, verified"
    )
    _say(f"digest {made.commit.digest}; fetched now {made.fetched_bytes:,} bytes")
    if args.format:
        from pipeline.export import export as write

        try:
            written = write(to, args.format, out)
        except UserError as error:
            raise UserError(f"{error} (the checkpoint itself has come, and is in {to})") from None
        storage.remove_tree(to)
        _say(f"made {out}: {args.format}, logits within {written.difference:.2g} of the checkpoint's")
    _say(
        f"next: normfree classify {shlex.quote(out)} IMAGE, or: normfree transfer {shlex.quote(out)} --suite SUITE ..."
    )
    return 0


def register(args: argparse.Namespace) -> int:
    from orchestration import registry
    from pipeline.redact import public

    made = registry.register(
        args.checkpoint, args.name, alias=args.alias, scorecard=args.scorecard, tracking_uri=args.tracking_uri
    )
    what = "registered" if made.is_new else "was registered before"
    _say(f"{what}: {made.name} version {made.version}, {public(made.source)}, digest {made.digest}")
    if made.note:
        _say(f"note: {made.note}")
    place = f"{made.name}@{args.alias}" if args.alias else f"{made.name}/{made.version}"
    where = f" --tracking-uri {shlex.quote(public(args.tracking_uri))}" if args.tracking_uri else ""
    _say(f"next: normfree pull models:/{place}{where}")
    return 0


def unregister(args: argparse.Namespace) -> int:
    from orchestration import registry
    from pipeline.redact import public

    done = registry.unregister(args.target, args.tracking_uri)
    if done.version:
        _say(f"unregistered: {done.version.name} version {done.version.version}, {public(done.version.source)}")
    _say(*(f"unpinned: {public(url)}" for url in done.unpinned))
    for url, reasons in done.kept.items():
        _say(*(f"still kept: {public(url)}: {public(why)}" for why in reasons))
    if done.note:
        _say(f"note: {done.note}")
    if not done.version and not done.unpinned:
        _say(f"nothing to do: {args.target} has no pin of a version that is gone")
    return 0


def ui(args: argparse.Namespace) -> int:
    from orchestration.ui import serve, serve_folder

    if args.team:
        from orchestration.team import serve_team

        return serve_team(
            args.tracking_uri,
            args.artifacts,
            host=args.host,
            port=args.port,
            allowed_hosts=args.allowed_hosts,
            workers=args.workers,
        )
    if not args.run and not args.tracking_uri:
        raise UserError("nothing to show: give a run or sweep folder, or --tracking-uri")
    if args.tracking_uri:
        return serve(args.tracking_uri, args.host, args.port)
    return serve_folder(args.run, args.host, args.port)


def track_import(args: argparse.Namespace) -> int:
    from orchestration.track import track_import as run

    return run(args)


def track_status(args: argparse.Namespace) -> int:
    from orchestration.track import track_status as run

    return run(args)
