"""Arguments of `normfree ui`, `track`, `pull` and `register`: records and what they point to."""

from __future__ import annotations

from typing import Any

from orchestration.arguments.parser import add


def records_commands(commands: Any) -> None:
    _ui(commands)
    _track(commands)
    _pull(commands)
    _register(commands)


def _ui(commands: Any) -> None:
    p = add(
        commands,
        "ui",
        "ui",
        "open MLflow on a run's or sweep's records; with --team, serve it to a group from PostgreSQL and a bucket",
        [
            "normfree ui runs/glyphs",
            "normfree ui --tracking-uri sqlite:///demo/mlflow.db --port 5001",
            "PGPASSWORD=... MLFLOW_AUTH_ADMIN_PASSWORD=... normfree ui --team \\",
            "      --tracking-uri postgresql://mlflow@db/mlflow --artifacts s3://bucket/mlflow --host 0.0.0.0",
        ],
    )
    p.add_argument("run", nargs="?", metavar="DIR", help="a run or sweep folder")
    p.add_argument("--tracking-uri", metavar="URI")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=5000)
    p.add_argument("--team", action="store_true", help="users with passwords, PostgreSQL, artifacts in a bucket")
    p.add_argument("--artifacts", metavar="URL", help="with --team: where files go, as s3://bucket/mlflow")
    p.add_argument(
        "--allowed-hosts", metavar="A,B", help="with --team: names under which browsers reach it (default: local ones)"
    )
    p.add_argument("--workers", type=int, default=4, metavar="N", help="with --team: server processes (default 4)")


def _track(commands: Any) -> None:
    track = commands.add_parser("track", help="records of runs: import, status")
    actions = track.add_subparsers(dest="action", metavar="ACTION", required=True)
    p = add(
        actions,
        "import",
        "track_import",
        "send the records of a run to a server, what is not there yet; a second time changes nothing",
        [
            "normfree track import runs/c100 --tracking-uri http://mlflow:5000",
            "normfree track import s3://bucket/runs/c100 --tracking-uri http://mlflow:5000",
        ],
    )
    p.add_argument("run", metavar="RUN", help="run folder, local or in an object store")
    p.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else SQLite in the run folder")
    p.add_argument("--experiment", metavar="NAME", help="default: the one that the run was made for")
    p.add_argument("--run-name", metavar="NAME", help="default: the run's own")
    p = add(
        actions,
        "status",
        "track_status",
        "list runs and how they ended; runs whose machine fell silent are marked as failed",
        ["normfree track status runs/c100", "normfree track status --tracking-uri http://mlflow:5000"],
    )
    p.add_argument("run", nargs="?", metavar="DIR", help="a run or sweep folder")
    p.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else SQLite in the folder")
    p.add_argument("--limit", type=int, default=100, metavar="N", help="runs to list (default %(default)s)")


def _pull(commands: Any) -> None:
    p = add(
        commands,
        "pull",
        "pull",
        "fetch a checkpoint into a local folder and verify every byte; the same command again goes on where it broke",
        [
            "normfree pull s3://bucket/runs/c100 --to c100",
            "normfree pull models:/digits@champion --tracking-uri http://mlflow.example:5000",
            "normfree pull s3://bucket/runs/f0 --format timm --to f0_timm",
        ],
    )
    p.add_argument(
        "url",
        metavar="URL",
        help="a checkpoint, a run folder (its newest one), models:/NAME@ALIAS or models:/NAME/VERSION",
    )
    p.add_argument("--to", metavar="DIR", help="a new local folder (default: ./ and the last part of the name)")
    p.add_argument(
        "--format",
        choices=["safetensors", "timm", "onnx"],
        help="end with an exported folder in place of the checkpoint",
    )
    p.add_argument(
        "--connections", type=int, default=8, metavar="N", help="parts fetched at a time (default %(default)s)"
    )
    p.add_argument("--tracking-uri", metavar="URI", help="of models:/...: MLflow; default: MLFLOW_TRACKING_URI")


def _register(commands: Any) -> None:
    p = add(
        commands,
        "register",
        "register",
        "give a checkpoint a name in MLflow's model registry; its bytes stay where they are",
        [
            "normfree register s3://bucket/runs/c100 c100 --alias champion --tracking-uri http://mlflow.example:5000",
            "normfree register runs/glyphs glyphs --scorecard sweeps/demo --tracking-uri sqlite:///demo/mlflow.db",
        ],
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest one)")
    p.add_argument("name", metavar="NAME", help="of the model in the registry")
    p.add_argument("--alias", metavar="ALIAS", help="such as champion; moved here if another version has it")
    p.add_argument("--scorecard", metavar="SWEEP", help="sweep folder of a transfer of this checkpoint")
    p.add_argument("--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI")
