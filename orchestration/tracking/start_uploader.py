"""The uploader's process: how a trainer starts it, and its entry point."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestration import child_process
from orchestration.spool.state_file import tell
from orchestration.tracking.mlflow_client import DRAIN_S
from orchestration.tracking.tracking_uri import resolve_uri
from pipeline.errors import UserError
from pipeline.secrets import public


def start_uploader(
    run_dir: str | os.PathLike[str],
    tracking_uri: str | None = None,
    *,
    experiment: str,
    run_name: str,
    drain_s: float = DRAIN_S,
    mirror: str | None = None,
) -> subprocess.Popen[bytes]:
    """The process that uploads `run_dir`'s spool for as long as this process lives; open the Spool before.

    It ends by itself: 0 when everything is there, 3 when `drain_s` seconds after the run's end something is not, which
    it says in one line on stderr. With `mirror`, an object-store folder, the spool is copied there as it grows
    (`orchestration.spool.mirror`). `tracking_uri` None means SQLite in the run folder. UserError for a URI that
    MLflow would not take.
    """
    uri = resolve_uri(tracking_uri, run_dir)
    words = [os.path.abspath(run_dir), "--watch-pid", str(os.getpid())]
    words += ["--experiment", experiment, "--run-name", run_name, "--drain-s", str(drain_s)]
    words += ["--mirror", mirror] if mirror else []
    # A session of its own: Ctrl-C in the terminal stops the trainer, whose last words must still be uploaded. The URI goes by
    # the environment: it may hold a password.
    return child_process.start(
        "orchestration.tracking.start_uploader",
        words,
        environment={"MLFLOW_TRACKING_URI": uri},
        on_parent_death=None,
        own_session=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The uploader's process: 0 all is there, 2 a mistake of the user, 3 something is not uploaded."""
    from orchestration.tracking.uploader import Uploader

    parser = argparse.ArgumentParser(prog="python -m orchestration.tracking.start_uploader", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else RUN_DIR/mlflow.db")
    parser.add_argument("--experiment", help="default: the one of the run's last upload, else normfree")
    parser.add_argument("--run-name", help="default: the one of the run's last upload, else the folder's name")
    parser.add_argument("--watch-pid", type=int, metavar="PID", help="follow the spool while this process lives")
    parser.add_argument("--drain-s", type=float, default=DRAIN_S, help="how long to try after the run's end")
    parser.add_argument("--mirror", metavar="URL", help="copy the spool to this object-store folder as it grows")
    args = parser.parse_args(arguments)
    try:
        if not (Path(args.run_dir) / "records.jsonl").exists() and args.watch_pid is None:
            raise UserError(f"no records in {args.run_dir} (records.jsonl is missing); give the folder of a run")
        uri = resolve_uri(args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), args.run_dir)
        names = {"experiment": args.experiment, "run_name": args.run_name, "mirror": args.mirror}
        os.nice(10)  # the steps of the training come first
        return Uploader(args.run_dir, uri, **names, watch_pid=args.watch_pid, drain_s=args.drain_s).run()
    except UserError as error:
        tell(public(str(error)))
        return 2


if __name__ == "__main__":
    sys.exit(main())
