"""`normfree doctor`: is everything fit, before GPUs are booked."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import doing, say
from orchestration.commands.parser import add
from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.doctor.examination import Asked, Report

EXIT_TO_BE_MENDED = 1


def doctor_command(commands: Any) -> None:
    p = add(
        commands,
        "doctor",
        doctor,
        "examine this host, or several and the network between them: versions, devices, limits, memory, disks, bucket, tracker, "
        "engine; exit code 1 where something is to be mended",
        [
            "normfree doctor",
            "normfree doctor --hosts n1,n2,n3 --out /shared/runs/f0 --data /shared/imagenet",
            "normfree doctor --out s3://bucket/runs/f0 --data s3://bucket/imagenet --tracking-uri http://mlflow:5000",
            "normfree doctor --quick --json",
        ],
    )
    p.add_argument("--hosts", metavar="A,B,C", help="over ssh, as ssh names them")
    p.add_argument("--hostfile", metavar="FILE", help="over ssh: one 'HOST slots=N' a line")
    p.add_argument("--python", metavar="PATH", default=sys.executable, help="the interpreter there (default: this one)")
    p.add_argument("--ssh-option", action="append", default=[], metavar="NAME=VALUE", help="as ssh -o takes it")
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
    if args.hosts or args.hostfile:
        report = _of_hosts(args, asked)
    else:
        with doing("examining this host"):
            report = examination.of_this_host(asked)
    if args.json:
        print(json.dumps(report.to_json(), indent=1), flush=True)
    else:
        say(*text.lines(report))
    return EXIT_TO_BE_MENDED if report.faults else 0


def _of_hosts(args: argparse.Namespace, asked: Asked) -> Report:
    """Each over an ssh of its own, all at the same time."""
    from orchestration.clusters import environment, hosts, ssh
    from orchestration.doctor import examination
    from orchestration.doctor.conversation import MODULE, Conversation

    if args.hosts and args.hostfile:
        raise UserError("--hosts and --hostfile both name hosts; give one of them")
    named = hosts.from_list(args.hosts) if args.hosts else hosts.from_file(args.hostfile)
    options = ssh.Options(python=args.python, ssh_options=tuple(args.ssh_option))
    options.check()
    setting = examination.Setting(
        environment=environment.launched(python=options.python),
        folder=options.folder,
        processes=hosts.processes_per_host(named, None) if any(host.slots for host in named) else 0,
    )
    with contextlib.ExitStack() as stack:
        group = [stack.enter_context(Conversation(host.label, ssh.command(host, options, MODULE))) for host in named]
        with doing(f"examining {len(group)} hosts"):
            return examination.of_hosts(
                group,
                asked,
                setting=setting,
                why=lambda host, text: text if host.code is None else ssh.why_ended(host.name, host.code, host.errors),
            )
