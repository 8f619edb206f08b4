"""`normfree lab`: methods of normalisation, and none, on equal terms; and the papers' claims about them."""

import argparse
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import say
from orchestration.commands.parser import add, number
from orchestration.commands.transfer import parse_budget, parse_time_s
from pipeline.display import shell
from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.tune.ray_cluster import Resources
    from orchestration.tune.ray_tune import SweepResult
    from transfer.lab.claims import Told
    from transfer.lab.experiment import Experiment
    from transfer.lab.largest_rate import Bisection
    from transfer.sweep.cells import Sweep

ALL = "claims"


def lab_command(commands: Any) -> None:
    p = add(
        commands,
        "lab",
        lab,
        "train with each of several normalisers, or none, on equal terms; or check a paper's claim about them",
        [
            "normfree lab --data data/cifar100 --out labs/all",
            "normfree lab --methods batch_norm,group_norm,none --data data/cifar100 --out labs/first",
            "normfree lab --methods batch_norm,group_norm --stat-groups 2,4,16,128 --shots 40 --seeds 3 --data data/cifar100 "
            "--out labs/groups",
            "normfree lab batch_norm_small_groups --data data/cifar100 --out labs/groups",
            "normfree lab --methods batch_norm,group_norm --stat-groups 16 --correlated --data data/cifar100 --out labs/sorted",
            "normfree lab claims --size tiny --data data/cifar100 --out labs/claims",
            "normfree lab --methods batch_norm,none --largest-rate --shots 40 --data data/cifar100 --out labs/rates",
            "normfree lab --list",
        ],
    )
    _add_options(p)


def _add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "experiment",
        metavar="EXPERIMENT",
        nargs="?",
        help="name of an experiment (--list), path of its YAML, or claims for all; without one, all methods or what the options "
        "say",
    )
    p.add_argument("--list", action="store_true", help="methods, trunks and experiments")
    p.add_argument("--data", metavar="URL", help="a prepared dataset, ROOT/<card>")
    p.add_argument("--out", metavar="URL", help="folder of the trials; the same command again goes on")
    p.add_argument(
        "--size",
        choices=("tiny", "full"),
        help="of an experiment: full as its file says, tiny for two cores (default full)",
    )
    p.add_argument(
        "--methods",
        metavar="A,B",
        help="methods (default all); with settings as normalizer_free:clipping=0.02:alpha=0.2",
    )
    p.add_argument("--trunk", metavar="NAME", help="the network between the normalisers (--list)")
    p.add_argument("--batches", metavar="N,N", help="samples of an update")
    p.add_argument("--stat-groups", metavar="N,N", help="samples that share statistics; 0 = the whole batch")
    p.add_argument("--rates", metavar="X,X", help="peak rates to choose from on the held-out part")
    p.add_argument("--each-rate", action="store_true", help="every rate is a line of its own; none is chosen")
    p.add_argument(
        "--correlated",
        action="store_true",
        help="every method a second time with batches sorted by class, so that groups hold few classes",
    )
    p.add_argument(
        "--largest-rate",
        action="store_true",
        help="also find the largest stable rate of each line by bisection, in short trials",
    )
    p.add_argument(
        "--downstream",
        metavar="A,B",
        help="prepared datasets beside --data, by card: few-shot ridge on each trained network's frozen features",
    )
    p.add_argument("--epochs", metavar="X", help="passes over the training images (default 2)")
    p.add_argument("--shots", metavar="N", help="training images of a class; 0 = all")
    p.add_argument("--image-px", metavar="N", help="side of the images")
    p.add_argument("--seeds", metavar="N", help="of weights, order, augmentation and drawn images")
    p.add_argument("--budget", metavar="TEXT", help="for this call: '100 trials', '1e6 images', '2 hours'")
    p.add_argument("--trial-limit", metavar="TIME", help="a trial that takes longer is a failed one, as '30 minutes'")
    p.add_argument(
        "--max-concurrent", type=number(int, 1), metavar="N", help="trials at a time (default: as many as cores allow)"
    )
    p.add_argument("--ray-address", metavar="ADDRESS", help="of a cluster, host:port; default: a Ray of its own")
    p.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI, else SQLite in --out")


FIELDS = ("methods", "trunk", "batches", "stat_groups", "rates", "epochs", "shots", "image_px", "seeds", "downstream")
"""Options that are fields of an experiment."""
LISTS = ("methods", "batches", "stat_groups", "rates", "downstream")


def lab(args: argparse.Namespace) -> int:
    """Exit code: 0 all trials have a result (a divergence is one), 1 some have none."""
    if args.list:
        return _list()
    for name in ("data", "out"):
        if not getattr(args, name):
            raise UserError(f"--{name} is missing; see 'normfree lab --help'")
    from transfer.lab.claims import print_claims, write_claims

    experiments = experiments_of(args)
    worst, told, several = 0, [], args.experiment == ALL
    if args.budget and any(e.largest_rate for e in experiments):
        raise UserError("--budget does not go with largest_rate, whose trials are bounded; leave one of them out")
    if several:
        experiments = _possible(experiments, args)
    for experiment in experiments:
        out = f"{args.out.rstrip('/')}/{experiment.name}" if several else args.out
        if several:
            say(f"experiment {experiment.name}: {experiment.claim}")
        code, one = _run(experiment, args, out)
        worst = max(worst, code)
        told.append(one)
        if several:  # what is known so far, should this end early
            paths = write_claims(told, args.out)
    if several:
        print_claims(told)
        say(*(f"{kind}: {path}" for kind, path in paths.items()))
    return worst


def _possible(experiments: list["Experiment"], args: argparse.Namespace) -> list["Experiment"]:
    """Those that these data can give; the others are told. UserError where that is none."""
    from transfer.lab.build import sweep_of_experiment

    found, refused = [], []
    for experiment in experiments:
        try:
            sweep_of_experiment(experiment, data=args.data, out=f"{args.out.rstrip('/')}/{experiment.name}")
            found.append(experiment)
        except UserError as error:
            refused.append(f"left out: {error}")
    if not found:
        raise UserError(refused[0].removeprefix("left out: "))
    say(*refused, f"{len(found)} of {len(experiments)} experiments")
    return found


def experiments_of(args: argparse.Namespace) -> list["Experiment"]:
    """What the words ask for. UserError where they say nothing to do, or twice."""
    from transfer.lab.experiment import list_experiments, load_experiment

    given = {field: value for field in FIELDS if (value := getattr(args, field)) is not None}
    if args.each_rate:
        given["each_rate"] = True
    if args.largest_rate:
        given["largest_rate"] = {}
    if args.correlated:
        given["correlated"] = True
    size = args.size or "full"
    if args.experiment == ALL:
        for option in (*sorted(set(given) - {"seeds"}), *(["budget"] if args.budget else [])):
            raise UserError(f"--{option.replace('_', '-')} does not go with all claims; name one experiment")
        return [_changed(load_experiment(name).at_size(size), given) for name in list_experiments()]
    if args.experiment is not None:
        return [_changed(load_experiment(args.experiment).at_size(size), given)]
    if args.size:
        raise UserError("--size is an experiment's; name one, or claims, or leave it out")
    return [_changed(None, {"methods": "all", **given, "name": "lab"})]


def _changed(experiment: "Experiment | None", given: dict[str, Any]) -> "Experiment":
    from nfnet.normalizers.registry import list_methods
    from pipeline.configuration import from_dict, to_dict
    from transfer.lab.experiment import Experiment

    words: dict[str, Any] = {k: v.split(",") if k in LISTS else v for k, v in given.items()}
    if words.get("methods") == ["all"]:
        words["methods"] = list_methods()
    before = to_dict(experiment) if experiment is not None else {}
    if words.pop("correlated", False):
        methods = words.get("methods", before.get("methods", []))
        words["methods"] = list(dict.fromkeys(w for m in methods for w in (m, _correlated(m))))
    return from_dict(Experiment, {**before, **words})


def _correlated(method: str) -> str:
    return method if ":correlated=" in method else f"{method}:correlated=true"


def _run(experiment: "Experiment", args: argparse.Namespace, out: str) -> tuple[int, "Told"]:
    """(exit code, verdict) of one experiment."""
    from orchestration.tune.ray_cluster import Resources
    from pipeline.storage import objects
    from transfer.lab.build import sweep_of_experiment
    from transfer.lab.claims import Told
    from transfer.lab.largest_rate import Bisection
    from transfer.lab.page import print_lab, write_lab_report
    from transfer.lab.table import lab_rows
    from transfer.lab.verdict import verdict
    from transfer.sweep.ledger import Ledger

    sweep, lines = sweep_of_experiment(experiment, data=args.data, out=out)
    resources = Resources(
        max_concurrent=args.max_concurrent,
        ray_address=args.ray_address,
        trial_limit_s=parse_time_s(args.trial_limit, "--trial-limit") if args.trial_limit else 0.0,
    )
    result = _trained(sweep, args, resources)
    rows = lab_rows(sweep, lines)
    bisection: Bisection | None = None
    if experiment.largest_rate is not None:
        bisection = _bisected(Bisection(experiment, experiment.largest_rate, args.data, out), args, resources)
        rows = bisection.enter(rows)
    found = verdict(experiment, rows)
    print_lab(experiment, rows, found)
    paths = write_lab_report(experiment, rows, found, sweep_url=sweep.out, out=objects.join(sweep.out, "report"))
    if result.spent:
        say(f"the budget of {result.spent} is spent; the same command goes on where this one ended")
    say(f"made {sweep.out}: {result.num_run} trials now, {result.num_failed} failed, {result.seconds_s:.0f} s")
    say(*(f"{kind}: {path}" for kind, path in paths.items()))
    say(f"next: open {paths['html']}, or: normfree ui {shell([sweep.out])}")
    lacking = [e for row in rows for e in row.entries if e.lacks_result]
    open_rates = bisection is not None and bisection.lacks_result
    return int(bool(lacking) or open_rates), Told(
        experiment=experiment, found=found, info=Ledger(sweep.out).info(), data=args.data
    )


def _trained(sweep: "Sweep", args: argparse.Namespace, resources: "Resources") -> "SweepResult":
    from orchestration.tune.ray_tune import run_sweep
    from orchestration.tune.sweep_listener import SweepListener

    listener = SweepListener(argparse.Namespace(**{**vars(args), "out": sweep.out}))
    result = run_sweep(sweep, budget=parse_budget(args.budget), resources=resources, tell=listener.hear)
    for row in result.not_run:
        say(f"not run: {row['task']} {row['method']}: {row['reason']}")
    listener.finish()
    return result


def _bisected(bisection: "Bisection", args: argparse.Namespace, resources: "Resources") -> "Bisection":
    """With its rounds run, or read where they were."""
    while (found := bisection.next_round()) is not None:
        sweep, asked = found
        say(f"largest rate, round {bisection.number}: " + ", ".join(f"{line.shown} {rate:g}" for line, rate in asked))
        _trained(sweep, args, resources)
        bisection.learn(sweep, asked)
    return bisection


def _list() -> int:
    from nfnet.normalizers.registry import list_methods, page
    from nfnet.trunks.networks import list_trunks
    from transfer.lab.experiment import list_experiments, load_experiment

    say("methods:")
    for name in list_methods():
        say(f"  {name:<24}{page(name).splitlines()[0]}")
    say("trunks: " + ", ".join(list_trunks()), "experiments:")
    for name in list_experiments():
        say(f"  {name:<32}{load_experiment(name).claim}")
    return 0
