"""`normfree launch`: a run on several machines, over ssh, under Slurm or Kubernetes; a sweep on Ray."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from typing import TYPE_CHECKING, Any

from orchestration.clusters.options import DEFAULTS, OPTIONS, check_used
from orchestration.commands.output import doing, say
from orchestration.commands.parser import add, number
from orchestration.commands.train import add_profile, asked_profile
from pipeline.display import terminal
from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.clusters.hosts import Host
    from orchestration.clusters.job import Job

SWEEP = "transfer"


def launch_commands(commands: Any) -> None:
    p = add(
        commands,
        "launch",
        launch,
        "run a recipe on several machines: over ssh, under Slurm or Kubernetes; the same command again resumes",
        [
            "normfree launch nfnet_f0_imagenet --hosts n1,n2 --processes-per-host 8 --data.url s3://b/in1k --out s3://b/runs/f0",
            "normfree launch run.yaml --hostfile hosts --out /shared/runs/mine --dry-run",
            "normfree launch run.yaml --slurm --nodes 8 --gpus-per-host 8 --partition gpu --out /shared/runs/mine",
            "normfree launch run.yaml --kubernetes --nodes 8 --gpus-per-host 8 --image registry/normfree:1 --out s3://b/runs/mine",
            "normfree launch run.yaml --torchrun --hosts n1,n2 --out /shared/runs/mine",
            "normfree launch transfer --kubernetes --nodes 4 --image registry/normfree:1 -- s3://b/runs/mine "
            "--suite small_images --data-root s3://b/data --out s3://b/sweeps/mine",
        ],
    )
    p.add_argument("recipe", metavar="RECIPE|FILE.yaml", help="or transfer, for a sweep; -- stands before its words")
    p.add_argument("--out", metavar="URL", help="run folder that all hosts share")
    where = p.add_argument_group("where")
    where.add_argument("--hosts", metavar="A,B,C", help="over ssh, as ssh names them")
    where.add_argument("--hostfile", metavar="FILE", help="over ssh: one 'HOST slots=N' a line")
    where.add_argument("--slurm", action="store_true", help="submit a job; with --dry-run print its script")
    where.add_argument(
        "--kubernetes",
        nargs="?",
        const="jobset",
        choices=["jobset", "job"],
        help="print manifests: a JobSet (default), or an indexed Job where there is no JobSet controller; of a sweep a RayJob",
    )
    where.add_argument("--torchrun", action="store_true", help="print a line of torch's launcher for each host")
    where.add_argument("--ray", metavar="HOST:PORT", help="of a sweep: the line for a Ray cluster that runs")
    for title, options in OPTIONS.items():
        group = p.add_argument_group(title)
        for name, kind, metavar, text in options:
            if kind is list:
                group.add_argument(name, action="append", default=[], metavar=metavar, help=text)
            elif kind is bool:
                group.add_argument(name, action="store_true", help=text)
            else:
                reader = number(int, 0) if kind is int else kind
                group.add_argument(name, type=reader, default=DEFAULTS.get(name), metavar=metavar, help=text)
    p.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI, else SQLite in the run folder"
    )
    add_profile(p)
    p.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="a variable more that hosts get, with its value here"
    )
    p.add_argument(
        "--dry-run", action="store_true", help="print what would run, and what each host would get, and stop"
    )


def launch(args: argparse.Namespace) -> int:
    if args.recipe == SWEEP:
        return _sweep(args)
    if args.sweep_words:
        raise UserError(f"unknown argument {args.sweep_words[0]!r}; leave it out; see 'normfree launch --help'")
    if args.ray:
        raise UserError("--ray is for sweeps: normfree launch transfer --ray HOST:PORT -- CHECKPOINT ...")
    asked = [name for name in ("hosts", "hostfile", "slurm", "kubernetes") if getattr(args, name)]
    if args.torchrun:
        asked = [name for name in asked if name not in ("hosts", "hostfile")] + ["torchrun"]
    if len(asked) != 1:
        raise UserError(
            f"{' and '.join(f'--{name}' for name in asked) or 'nothing'} says where to run; give one of --hosts, "
            "--hostfile, --slurm, --kubernetes, --torchrun"
        )
    _check_used(args, "--hosts" if asked[0] == "hostfile" else f"--{asked[0]}")
    asked_profile(args)
    with doing("loading PyTorch"):
        from orchestration.clusters.hosts import processes_per_host
        from orchestration.clusters.job import Job
        from orchestration.commands.train import asked_run, checked
        from pipeline.provenance import command
        from pipeline.training.check_run import check_run

    hosts = _named_hosts(args)
    run, _ = asked_run(args)
    job = Job(
        run=run,
        out=args.out if "://" in (args.out or "") or not args.out else os.path.abspath(args.out),
        command=command(),
        num_hosts=len(hosts),
        processes=processes_per_host(
            hosts, args.gpus_per_host if args.processes_per_host is None else args.processes_per_host
        ),
        min_hosts=1 if args.min_hosts is None else args.min_hosts,
        first_hosts=args.min_hosts,
        max_restarts=args.max_restarts,
        debug=args.debug,
    )
    job.check()
    with doing("checking the run against its data"):
        if args.dry_run or args.kubernetes or args.torchrun:  # not everybody who plans a run can read its data
            check_run(run, num_ranks=job.num_hosts * job.processes, read_data=False)
        else:
            checked(run, job.num_hosts * job.processes)
    if args.slurm:
        return _slurm(args, job)
    if args.kubernetes:
        return _kubernetes(args, job)
    if args.torchrun:
        return _torchrun(args, job, hosts)
    return _ssh(args, job, hosts)


def _check_used(args: argparse.Namespace, where: str) -> None:
    given = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    check_used(given, where, is_sweep=args.recipe == SWEEP)


def _named_hosts(args: argparse.Namespace) -> list[Host]:
    """Those of --hosts or the hostfile; of a cluster as many as --nodes, without names."""
    from orchestration.clusters import hosts

    if args.hosts and args.hostfile:
        raise UserError("--hosts and --hostfile both name the hosts; give one of them")
    if args.hosts:
        return hosts.from_list(args.hosts)
    if args.hostfile:
        return hosts.from_file(args.hostfile)
    if args.torchrun:
        raise UserError("--torchrun needs the machines: give --hosts or --hostfile")
    if not args.nodes or not 1 <= args.nodes <= hosts.MAX_HOSTS:
        raise UserError(
            f"--{'slurm' if args.slurm else 'kubernetes'} needs the number of machines: give --nodes, 1 to {hosts.MAX_HOSTS}"
        )
    return [hosts.Host(str(index)) for index in range(args.nodes)]


def _environment(args: argparse.Namespace) -> dict[str, str]:
    from orchestration.clusters import environment
    from orchestration.run.worker import PROFILE
    from orchestration.tracking.tracking_uri import chosen_uri

    found = environment.launched(args.env, tracking_uri=chosen_uri(args.tracking_uri), python=args.python)
    profile = asked_profile(args)
    return {**found, PROFILE: profile} if profile else found


def _ssh(args: argparse.Namespace, job: Job, hosts: list[Host]) -> int:
    from orchestration.clusters import dry_run, many_hosts
    from orchestration.clusters.ssh import Options

    options = Options(
        python=args.python,
        ssh_options=tuple(args.ssh_option),
        interface=args.interface,
        store_address=args.store_address,
        store_port=args.store_port,
    )
    options.check()
    if args.dry_run:
        say(*dry_run.over_ssh(job, hosts, _environment(args), options))
        return 0
    return many_hosts.launch(job, hosts, _environment(args), options)


def _slurm(args: argparse.Namespace, job: Job) -> int:
    from orchestration.clusters import slurm

    options = slurm.Options(
        python=args.python,
        folder=os.getcwd(),
        name=args.job_name or job.run.name or "normfree",
        partition=args.partition,
        account=args.account,
        time=args.time,
        gpus=args.gpus_per_host,
        cpus=args.cpus_per_host,
        more=tuple(args.slurm_option),
    )
    text = slurm.script(job, options)
    if args.dry_run:
        _print(text)
        return 0
    os.environ.update(_environment(args))  # sbatch hands on this process's; nothing of it stands in the script
    say(slurm.submit(text, has_partition=args.partition is not None))
    return 0


def _kubernetes(args: argparse.Namespace, job: Job) -> int:
    from orchestration.clusters import kubernetes

    options = _kubernetes_options(args, job.run.name)
    options.check_place(job.out, "--out")
    options.check_place(job.run.data.url, "--data.url")
    environment = _environment(args)
    make = kubernetes.jobset if args.kubernetes == "jobset" else kubernetes.indexed_job
    _print(kubernetes.text(make(job, options, environment), options, environment))
    return 0


def _kubernetes_options(args: argparse.Namespace, name: str) -> Any:
    from orchestration.clusters.kubernetes import MAX_NAME, Options

    if not args.image:
        raise UserError("--kubernetes needs --image: a container image that has normfree and its libraries")
    return Options(
        image=args.image,
        name=args.job_name or re.sub("[^a-z0-9]+", "-", name.lower())[:MAX_NAME].strip("-") or "normfree",
        gpus=args.gpus_per_host,
        cpus=args.cpus_per_host,
        memory=args.memory,
        secret=args.secret,
        claim=args.claim,
        spot=args.spot,
    )


def _torchrun(args: argparse.Namespace, job: Job, hosts: list[Host]) -> int:
    from orchestration.clusters import plain
    from orchestration.clusters.job import new_run_id

    named = {"out": job.out, "tracking-uri": args.tracking_uri, "profile": args.profile, **args.fields}
    words = [word for name, value in named.items() if value is not None for word in (f"--{name}", value)]
    words = ["normfree", "pretrain", args.recipe, *words, *["--debug"] * args.debug]
    say(*plain.torchrun(job, hosts, words, run_id=new_run_id(), port=args.store_port))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    """The words after -- are those of `normfree transfer`; they are read before anything is printed."""
    from orchestration.clusters import kubernetes
    from orchestration.commands.parser import Parser
    from orchestration.commands.transfer import transfer_commands

    if args.fields or args.out:
        raise UserError(
            "the words of the sweep stand after --: normfree launch transfer --ray HOST:PORT -- CHECKPOINT ..."
        )
    if bool(args.kubernetes) == bool(args.ray) or args.hosts or args.hostfile or args.slurm or args.torchrun:
        raise UserError(
            "a sweep runs on Ray: give --ray HOST:PORT of a cluster that runs, or --kubernetes for one of its own"
        )
    _check_used(args, "--ray" if args.ray else "--kubernetes")
    parser = Parser(prog="normfree")
    transfer_commands(parser.add_subparsers())
    asked, rest = parser.parse_known_args([SWEEP, *args.sweep_words])
    if rest or asked.ray_address:
        raise UserError(
            f"'normfree transfer' gets no {rest[0] if rest else '--ray-address'} here; see 'normfree transfer --help'"
        )
    line = shlex.join(["normfree", SWEEP, *args.sweep_words, "--ray-address", args.ray or "auto"])
    if args.ray:
        say(line)
        return 0
    if not args.nodes or args.nodes < 1:
        raise UserError("--kubernetes needs the number of workers: give --nodes, 1 or more")
    options = _kubernetes_options(args, SWEEP)
    for option, place in (
        ("--out", asked.out),
        ("--data-root", asked.data_root),
        *(("--data", d) for d in asked.data or ()),
    ):
        if place:
            options.check_place(place, option)
    environment = _environment(args)
    _print(kubernetes.text(kubernetes.ray_job(line, options, environment, args.nodes), options, environment))
    return 0


def _print(text: str) -> None:
    print(terminal(text, keep_lines=True, max_characters=len(text)), end="")
