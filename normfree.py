"""The command `normfree`: makes sure that the packages it starts are its own.

Their names are common words. Where another installed package of the same name is found first, everything that follows would
fail in a way that nobody understands.
"""

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("nfnet", "pipeline", "transfer", "orchestration")
NEEDED = ("fsspec", "deepspeed", "mlflow", "ray")
"""One library of each kind that the extra `cli` brings."""


def problem() -> str:
    """What stands in the way of our packages, "" if nothing does. Imports none of them."""
    here = Path(__file__).resolve().parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != here / name:
            where = f"is found first in {found}" if found else "is missing"
            return (
                f"the package {name!r} of normfree in {here} {where}; install normfree into an environment of its own, and "
                "take other folders off PYTHONPATH"
            )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"the command needs {', '.join(missing)}, which the networks alone do not; pip install 'normfree[cli]'"
    return ""


def program() -> None:
    wrong = problem()
    if wrong:
        print(f"normfree: {wrong}", file=sys.stderr)
        sys.exit(2)
    from orchestration.cli import program as command

    command()


if __name__ == "__main__":
    program()
