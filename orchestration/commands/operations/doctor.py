"""`normfree doctor`: is everything fit, before GPUs are booked."""

from __future__ import annotations

import argparse
import json
from typing import Any

from orchestration.commands.output import doing, say
from orchestration.commands.parser import add

EXIT_TO_BE_MENDED = 1


def doctor_command(commands: Any) -> None:
    p = add(
        commands,
        "doctor",
        doctor,
        "examine this host: versions, devices, limits, memory, disks, bucket, tracker, engine; exit code 1 where something is "
        "to be mended",
        [
            "normfree doctor",
            "normfree doctor --out s3://bucket/runs/f0 --data s3://bucket/imagenet --tracking-uri http://mlflow:5000",
            "normfree doctor --quick --json",
        ],
    )
    p.add_argument(
        "--out", metavar="URL", help="where a run will write: rights, speed, room (a small object, removed again)"
    )
    p.add_argument("--data", metavar="URL", help="a prepared dataset that will be read")
    p.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI, where it is set")
    p.add_argument("--quick", action="store_true", help="leave out the engine's comparison with plain PyTorch")
    p.add_argument("--json", action="store_true", help="everything that was found, for programs")


def doctor(args: argparse.Namespace) -> int:
    """Exit code: 0 all is well, 1 something is to be mended."""
    from orchestration.tracking.tracking_uri import chosen_uri

    uri = chosen_uri(args.tracking_uri)  # a mistake in it is said at once
    with doing("loading PyTorch"):
        from orchestration.doctor import examination, text

    asked = examination.Asked(out=args.out or "", data=args.data or "", tracking_uri=uri or "", parity=not args.quick)
    with doing("examining this host"):
        report = examination.of_this_host(asked)
    if args.json:
        print(json.dumps(report.to_json(), indent=1), flush=True)
    else:
        say(*text.lines(report))
    return EXIT_TO_BE_MENDED if report.faults else 0
