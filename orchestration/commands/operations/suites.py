"""`normfree suites`: what transfer can measure, and the form of a suite of one's own."""

import argparse
from typing import Any

from orchestration.commands.output import say
from orchestration.commands.parser import add


def suites_command(commands: Any) -> None:
    p = add(
        commands,
        "suites",
        suites,
        "the suites that transfer can measure, or one of them in full; the form of a suite of your own",
        ["normfree suites", "normfree suites small_images", "normfree suites --schema > suite.schema.json"],
    )
    p.add_argument(
        "suite", nargs="?", metavar="NAME", help="of a suite, or path of its YAML: its tasks and methods in full"
    )
    p.add_argument("--schema", action="store_true", help="JSON Schema of a suite's YAML, for editors and checkers")


def suites(args: argparse.Namespace) -> int:
    import json

    import yaml

    from transfer.protocol.suite_files import list_suites, load_suite
    from transfer.protocol.suite_schema import schema

    if args.schema:
        print(json.dumps(schema(), indent=1))
    elif args.suite:
        say(*yaml.safe_dump(load_suite(args.suite).plain(), sort_keys=False, allow_unicode=True).splitlines())
    else:
        found = {name: load_suite(name) for name in list_suites()}
        wide = max(map(len, found))
        say(
            *(
                f"{n:{wide}}  {s.title} ({len(s.tasks)} task{'s' * (len(s.tasks) != 1)}; {', '.join(m.name for m in s.methods)})"
                for n, s in found.items()
            )
        )
        say(
            "one of them in full: normfree suites NAME; your own: a YAML file of that form, see docs/configuration.md, A suite"
        )
    return 0
