"""Where the work of a data command runs: in processes of this machine, as a part of a job array, or on a Ray cluster."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from orchestration.commands.parser import number
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.parts import Part
    from pipeline.data.process_pool import Each

T = TypeVar("T")


def add_parts(p: argparse.ArgumentParser, *, has_results: bool = False) -> None:
    """`has_results`: parts leave theirs in a folder, since the command writes none of its own."""
    p.add_argument(
        "--workers",
        type=number(int, 1, 4096),
        metavar="N",
        help="processes (default: one a core); changes nothing but speed",
    )
    p.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="run on this Ray cluster instead, host:port; its nodes must see the same places",
    )
    array = p.add_mutually_exclusive_group()
    array.add_argument(
        "--part", metavar="K/N", help="do this share of the work only, as 3/64 in a job array; --merge comes last"
    )
    array.add_argument(
        "--merge", action="store_true", help="put together what the parts did; refuses while one is missing"
    )
    if has_results:
        p.add_argument("--results", metavar="FOLDER", help="where parts leave what they found, for --merge")


def part_of(args: argparse.Namespace) -> "Part | None":
    """UserError for a share that is none, or results without a place."""
    from pipeline.data.parts import Part

    if hasattr(args, "results") and bool(args.part or args.merge) != bool(args.results):
        raise UserError("--results FOLDER goes with --part and --merge: give it with them, and only then")
    return Part.parse(args.part) if args.part else None


def result_of(
    args: argparse.Namespace,
    work: str,
    kind: type[T],
    find: "Callable[[Part | None], T]",
    merged: Callable[[list[T]], T],
) -> T:
    """What `find` finds, a dataclass, which a part leaves for --merge; with --merge what all parts have found.

    Args:
        work: what is done with what, by which the results of other work are told apart.
    Raises:
        UserError: as `part_of`, or a part is missing.
    """
    from pipeline import documents
    from pipeline.data import parts

    part = part_of(args)
    if args.merge:
        results = parts.results(args.results, work)
        return merged([documents.convert(value, kind, args.results) for value in results])
    found = find(part)
    if part is not None:
        parts.record(args.results, part, work, asdict(found))  # type: ignore[call-overload]
    return found


@contextlib.contextmanager
def spread(args: argparse.Namespace) -> "Iterator[Each | None]":
    """What runs the pieces of the work; None: processes of this machine."""
    if args.ray_address is None:
        yield None
        return
    if args.workers is not None:
        raise UserError(
            "--workers is of this machine and --ray-address of a cluster, which has its own cores: give one"
        )
    from orchestration.tune.ray_each import ray_each

    with ray_each(args.ray_address) as run_each:
        yield run_each
