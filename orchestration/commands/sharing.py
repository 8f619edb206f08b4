"""`normfree pull` and `push`: a model from where it lies to this machine, and from here to the Hugging Face Hub."""

import argparse
from pathlib import Path
from typing import Any

from orchestration.commands.models import NEXT, export_as_asked, export_options
from orchestration.commands.output import doing, progress_bar, say
from orchestration.commands.parser import add, number
from pipeline.display import shell
from pipeline.errors import UserError


def sharing_commands(commands: Any) -> None:
    _pull(commands)
    _push(commands)


def _pull(commands: Any) -> None:
    p = add(
        commands,
        "pull",
        pull,
        "fetch a checkpoint into a local folder and verify every byte; the same command again goes on where it broke",
        [
            "normfree pull s3://bucket/runs/c100 --to c100",
            "normfree pull models:/digits@champion --tracking-uri http://mlflow.example:5000",
            "normfree pull s3://bucket/runs/f0 --format timm --to f0_timm",
            "normfree pull hf://my-org/c100 --to c100",
        ],
    )
    p.add_argument(
        "url",
        metavar="URL",
        help="a checkpoint, a run folder (its newest one), models:/NAME@ALIAS or models:/NAME/VERSION; hf://ORG/NAME[@REVISION]: "
        "an exported folder that 'push' sent (HF_TOKEN where it is private)",
    )
    p.add_argument("--to", metavar="DIR", help="a new local folder (default: ./ and the last part of the name)")
    p.add_argument(
        "--format",
        choices=["safetensors", "timm", "onnx"],
        help="end with an exported folder in place of the checkpoint",
    )
    p.add_argument("--connections", type=number(int, 1), default=8, metavar="N", help="at a time (default %(default)s)")
    p.add_argument("--tracking-uri", metavar="URI", help="of models:/...: MLflow; default: MLFLOW_TRACKING_URI")


def pull(args: argparse.Namespace) -> int:
    from orchestration.registry import hub, registry
    from pipeline.checkpoint.pull import pull as fetch
    from pipeline.storage import objects

    if hub.is_place(args.url):
        return _pull_export(args)
    url, digest = args.url, None
    name = url.rstrip("/").rpartition("/")[2] or "checkpoint"
    if registry.is_name(url):
        with doing("asking the registry"):
            version = registry.find(url, args.tracking_uri)
        url, digest, name = version.source, version.digest, version.name
    out = args.to or name
    if args.format and objects.list_urls(out):
        raise UserError(f"{out} is not empty; give another folder with --to")
    to = f"{out.rstrip('/')}.checkpoint" if args.format else out
    with progress_bar("pulling", "bytes") as update:
        made = fetch(
            url, to, digest=digest, connections=args.connections, progress=lambda there, total: update("", there, total)
        )
    say(*(f"passed over  {bad.url}: {bad.reason}" for bad in made.passed))
    files = made.commit.files
    say(
        f"made {to}: step {made.commit.step} of {made.commit.url}, {len(files)} files, {made.commit.size_bytes:,} bytes, verified"
    )
    say(f"digest {made.commit.digest}; fetched now {made.fetched_bytes:,} bytes")
    if args.format:
        from pipeline.export.export import export as write

        try:
            with doing("exporting, and comparing the answers"):
                written = write(to, args.format, out)
        except UserError as error:
            raise UserError(f"{error} (the checkpoint itself has come, and is in {to})") from None
        objects.remove_tree(to)
        say(f"made {out}: {args.format}, logits within {written.difference:.2g} of the checkpoint's")
    say(f"next: normfree classify {shell([out])} IMAGE, or: normfree transfer {shell([out])} --suite SUITE ...")
    return 0


def _pull_export(args: argparse.Namespace) -> int:
    from orchestration.registry import hub

    if args.format:
        raise UserError(f"--format is of checkpoints, and {args.url} is an exported folder already; leave it out")
    out = args.to or hub.parse(args.url).repository.partition("/")[2]
    with doing("pulling"):
        made = hub.pull(args.url, out, connections=args.connections)
    num_bytes = sum(file["size_bytes"] for file in made.files)
    say(f"made {out}: {made.kind}, {len(made.files) + 1} files, {num_bytes:,} bytes, verified; digest {made.digest}")
    say(f"licence: {made.license or 'none was given'}")
    if made.kind == "mlflow":
        say("MLflow runs code that stands in such a folder: load it only if you trust who pushed it")
    say("next: " + NEXT[made.kind].format(out=shell([out])))
    return 0


def _push(commands: Any) -> None:
    p = add(
        commands,
        "push",
        push,
        "a checkpoint, exported with its model card, or an exported folder as it is, to the Hugging Face Hub in one commit",
        [
            "normfree push runs/c100 hf://my-org/c100 --license apache-2.0",
            "normfree push s3://bucket/runs/f0 hf://my-org/f0 --format timm --license cc-by-nc-4.0 --scorecard sweeps/f0",
            "normfree push exports/c100 hf://my-org/c100@v2 --private",
        ],
    )
    p.add_argument(
        "source", metavar="SOURCE", help="a checkpoint, a run folder (its newest one), or what 'normfree export' made"
    )
    p.add_argument(
        "to",
        metavar="hf://ORG/NAME[@BRANCH]",
        help="made if need be; the token comes from HF_TOKEN, the server from HF_ENDPOINT",
    )
    p.add_argument(
        "--format",
        choices=["safetensors", "timm", "onnx"],
        help="of the export: safetensors, which 'pull' gives back to every command (default); timm, for "
        "timm.create_model('hf-hub:ORG/NAME')",
    )
    p.add_argument("--private", action="store_true", help="a repository that is made is not for everybody")
    export_options(p)


def push(args: argparse.Namespace) -> int:
    from orchestration.registry import hub
    from pipeline.checkpoint import exported
    from pipeline.places import temporary_folder

    place = hub.parse(args.to)
    is_made = exported.is_exported(args.source)
    given = [f"--{name}" for name in ("format", "license", "scorecard") if getattr(args, name)]
    if is_made and given:
        raise UserError(
            f"{args.source} is exported already and goes as it is; leave out {given[0]}, or give the checkpoint"
        )
    if not (exported.listed(args.source).license if is_made else args.license):
        raise UserError(
            "nobody may use a model without a licence; give --license ID" + (" when you export it" if is_made else "")
        )
    args.format = args.format or "safetensors"
    with temporary_folder("push") as temporary:
        folder = temporary / "export"
        if is_made:
            folder = _local(args.source, folder)
        else:
            with doing("exporting, and comparing the answers"):
                made = export_as_asked(args, args.source, str(folder))
            say(f"exported {made.source_url}: {made.kind}, logits within {made.difference:.2g} of the checkpoint's")
        with doing("pushing"):
            url = hub.push(folder, args.to, private=args.private)
            kind = exported.listed(folder).kind
    say(f"made {args.to}: {url}")
    loads = f"timm.create_model('hf-hub:{place.repository}', pretrained=True)"
    say(f"next: {loads}" if kind == "timm" else f"next: normfree pull {shell([args.to])}")
    return 0


def _local(url: str, folder: Path) -> Path:
    """The exported folder on this machine; fetched to `folder` from elsewhere."""
    from pipeline.checkpoint import exported
    from pipeline.storage import objects

    if objects.is_local(url):
        return objects.local_path(url)
    for name in (*(file["name"] for file in exported.listed(url).files), exported.NAME):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        objects.download(objects.join(url, name), folder / name)
    return folder
