"""`normfree plan`: what a run will need on machines that nobody has to have yet."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import doing, say
from orchestration.commands.parser import add, number
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.planning.assumptions import Assumption
    from pipeline.planning.devices import Device
    from pipeline.planning.plan import Plan
    from pipeline.training.run import Run


def plan_command(commands: Any) -> None:
    p = add(
        commands,
        "plan",
        plan,
        "memory, step time, communication, data, checkpoints, days and cost of a run on machines of your choice",
        [
            "normfree plan nfnet_f4_plus_300m --nodes 16 --gpus-per-node 8 --device h100 --network 400Gb",
            "normfree plan nfnet_f7_plus_4b --nodes 1,8,64,512 --device h100 --price-per-device-hour 2.5",
            "normfree plan run.yaml --data s3://bucket/imagenet --engine.zero_stage 2 --json",
            "normfree plan nfnet_tiny_glyphs --data data/glyphs --device cpu --gpus-per-node 1 --measure",
            "normfree plan --scaling runs.json --budget 1e5 --plot scaling.png",
        ],
    )
    p.add_argument("recipe", nargs="?", metavar="RECIPE|FILE.yaml")
    p.add_argument("--nodes", default="1", metavar="N[,N]", help="hosts; several give a table (default %(default)s)")
    p.add_argument(
        "--gpus-per-node",
        type=number(int, 1, 1 << 20),
        default=8,
        metavar="N",
        help="devices of a host (default %(default)s)",
    )
    p.add_argument("--device", default="h100", metavar="NAME", help="h100, h200, a100, b200, cpu, ... (default h100)")
    p.add_argument(
        "--network", default="400Gb", metavar="RATE", help="of a host to the others, all adapters (default %(default)s)"
    )
    p.add_argument("--data", metavar="URL", help="a prepared dataset: number, size and classes of its images")
    p.add_argument(
        "--samples", type=number(int, 1, 10**15), metavar="N", help="training images, where there is no dataset yet"
    )
    p.add_argument(
        "--classes",
        type=number(int, 1, 1 << 30),
        default=1000,
        metavar="N",
        help="without --data (default %(default)s)",
    )
    p.add_argument("--price-per-device-hour", type=number(float, 0, 1e9), metavar="X", help="in your currency")
    p.add_argument(
        "--power", type=number(float, 0.001, 1e9), metavar="W", help="of one device (default: its maker's figure)"
    )
    p.add_argument("--failure-rate", type=number(float, 0, 1e9), metavar="X", help="interruptions of one device a day")
    p.add_argument("--loss", default="1%", metavar="SHARE", help="that saves and failures may cost (default 1%%)")
    p.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="set a number that the plan rests on"
    )
    p.add_argument(
        "--scaling", metavar="FILE|URI", help="instead: fit loss against compute of finished runs (list, or MLflow)"
    )
    p.add_argument(
        "--budget", type=number(float, 0, 1e300), metavar="X", help="with --scaling: compute, in the unit of the runs'"
    )
    p.add_argument("--plot", metavar="FILE", help="with --scaling: draw it, .png, .svg or .pdf")
    p.add_argument("--measure", action="store_true", help="time real steps on the device at hand, and use that")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.epilog = (p.epilog or "") + "\n\nAny field of the configuration is an option by its path, as in pretrain"


def plan(args: argparse.Namespace) -> int:
    if args.scaling:
        from orchestration.commands.operations.scaling import scaling

        return scaling(args)
    if args.budget is not None or args.plot:
        raise UserError("--budget and --plot belong to --scaling; give it the file or tracker with finished runs")
    numbers = _node_counts(args.nodes)
    network_bytes_per_s, loss = _rate(args.network, "--network"), _share(args.loss)
    if args.recipe is None:
        raise UserError("no recipe: give the name of one ('normfree pretrain --list' prints them) or a FILE.yaml")
    with doing("loading PyTorch"):
        from orchestration.commands.train import asked_run
        from orchestration.operations.plan_text import lines
        from pipeline.planning.devices import device
        from pipeline.planning.plan import Plan, plans
        from pipeline.planning.plan_record import to_dict
        from pipeline.planning.planned_network import Network

    kind = device(args.device)
    if args.measure:
        from pipeline.planning.measure import check_device, measured

        check_device(kind)
    run, _ = asked_run(args)
    for n in numbers:
        dataclasses.replace(run, micro_batch=0).batch_plan(n * args.gpus_per_node)
    samples, classes, bytes_per_image = _data(args, run)
    assumed = _assumed(args, kind, bytes_per_image)
    with doing("counting the network's memory and work"):
        network = Network.of(run, classes)
    first = Plan(
        run, network, kind, assumed, numbers[0], args.gpus_per_node, samples, network_bytes_per_s,
        loss=loss, price=args.price_per_device_hour,
    )  # fmt: skip
    if args.measure:
        with doing("taking real steps"):
            first = measured(first, num_classes=classes)
    found: list[Plan] = plans(first, numbers)
    if args.json:
        print(json.dumps([to_dict(p) for p in found] if len(found) > 1 else to_dict(found[0]), indent=1))
    else:
        say(*lines(found))
    return 0


def _node_counts(text: str) -> list[int]:
    words = [w.strip() for w in text.split(",")]
    if not all(w.isdigit() and int(w) > 0 for w in words) or len(set(words)) < len(words):
        raise UserError(f"--nodes is {text!r}; give a number of 1 or more, or different ones with commas, as 1,8,64")
    return [int(w) for w in words]


def _rate(text: str, option: str) -> float:
    """Bytes a second of text as 400Gb, 100Gbit/s, 12.5GB."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kMGT])(b|bit|B|byte)s?(?:ps|/s)?\s*", text)
    try:
        value = float(match[1]) if match else 0.0
    except ValueError:
        value = 0.0
    if match is None or not value > 0:
        raise UserError(f"{option} is {text!r}; write a number and its unit, as 400Gb (bits a second) or 50GB (bytes)")
    size = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]
    return value * size / (1 if match[3].startswith("B") or match[3] == "byte" else 8)


def _share(text: str) -> float:
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"--loss is {text!r}; write a share above 0 and below 1, as 1% or 0.01")
    return value


def _data(args: argparse.Namespace, run: Run) -> tuple[int, int, float | None]:
    """(training images, classes, bytes of an image or None): of the dataset, of --samples, or as the recipe states them."""
    from pipeline import recipes
    from pipeline.data.format.manifest import Manifest
    from pipeline.data.loading.datasets import samples_per_epoch

    if args.samples is not None and args.data:
        raise UserError("--samples and --data are both given; the dataset says how many images it has, leave out one")
    url = args.data or ("" if args.samples is not None else run.data.url)
    if url:
        config = dataclasses.replace(run.data, url=url)
        manifest = Manifest.open(url)
        split = manifest.splits.get(run.data.train_split.split("+")[0])
        size = split.num_bytes / split.num_samples if split is not None and split.num_samples else None
        return samples_per_epoch(config) // config.repeats, len(manifest.outputs), size
    if args.samples is not None:
        return args.samples, args.classes, None
    if args.recipe.endswith((".yaml", ".yml")):
        raise UserError("no data: give --data URL of a prepared dataset, or --samples N")
    return recipes.find(args.recipe).num_images, args.classes, None


def _assumed(args: argparse.Namespace, kind: Device, bytes_per_image: float | None) -> Mapping[str, Assumption]:
    from pipeline.planning.assumptions import assumptions, replaced
    from pipeline.planning.measure import host_memory_gb

    known = assumptions(kind)
    if kind.is_cpu:
        known = replaced(known, {"device_memory_gb": str(host_memory_gb())}, "this machine's memory")
    if bytes_per_image is not None:
        known = replaced(
            known, {"bytes_per_image": str(bytes_per_image)}, f"{args.data or 'the dataset'}: shards / images"
        )
    given: dict[str, str] = {}
    for text in args.assume:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--assume is {text!r}; write NAME=VALUE, as compute_share=0.3")
        given[name.strip()] = value
    for name, value in (("watts", args.power), ("failures_per_device_day", args.failure_rate)):
        if value is not None:
            given[name] = str(value)
    return replaced(known, given, "given")
