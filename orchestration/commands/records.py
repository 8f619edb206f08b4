"""`normfree ui` and `normfree track`: the records of runs and sweeps."""

import argparse
import os
from typing import Any

from orchestration.commands.output import doing, say
from orchestration.commands.parser import add, number
from pipeline.errors import UserError
from pipeline.secrets import public


def records_commands(commands: Any) -> None:
    _ui(commands)
    _track(commands)


def _ui(commands: Any) -> None:
    p = add(
        commands,
        "ui",
        ui,
        "open MLflow on a run's or sweep's records; with --team, serve it to a group from PostgreSQL and a bucket",
        [
            "normfree ui runs/glyphs",
            "normfree ui s3://bucket/runs/c100",
            "normfree ui --tracking-uri sqlite:///demo/mlflow.db --port 5001",
            "PGPASSWORD=... MLFLOW_AUTH_ADMIN_PASSWORD=... normfree ui --team \\",
            "      --tracking-uri postgresql://mlflow@db/mlflow --artifacts s3://bucket/mlflow \\",
            "      --host 0.0.0.0 --certificate server.pem --key server.key",
        ],
    )
    p.add_argument("run", nargs="?", metavar="URL", help="a run or sweep folder, local or in an object store")
    p.add_argument("--tracking-uri", metavar="URI")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=number(int, 0, 65535), default=5000)
    p.add_argument("--team", action="store_true", help="users with passwords, PostgreSQL, artifacts in a bucket")
    p.add_argument("--artifacts", metavar="URL", help="with --team: where files go, as s3://bucket/mlflow")
    p.add_argument(
        "--allowed-hosts",
        metavar="A,B",
        help="with --team: names under which browsers reach it besides this machine's own names and addresses",
    )
    p.add_argument(
        "--certificate",
        metavar="FILE",
        help="with --team: serve TLS with this PEM certificate; without, passwords travel unencrypted",
    )
    p.add_argument("--key", metavar="FILE", help="with --certificate: its private key, where that is another PEM file")
    p.add_argument(
        "--workers", type=number(int, 1), default=4, metavar="N", help="with --team: server processes (default 4)"
    )


def ui(args: argparse.Namespace) -> int:
    from orchestration.serve.server import serve, serve_folder

    if args.team:
        from orchestration.serve.team_server import serve_team

        return serve_team(
            args.tracking_uri,
            args.artifacts,
            host=args.host,
            port=args.port,
            allowed_hosts=args.allowed_hosts,
            workers=args.workers,
            certificate=args.certificate,
            key=args.key,
        )
    if args.certificate or args.key:
        raise UserError("--certificate and --key are for --team; without it a server is for one user and this machine")
    if not args.run and not args.tracking_uri:
        raise UserError("nothing to show: give a run or sweep folder, or --tracking-uri")
    if args.tracking_uri:
        return serve(args.tracking_uri, args.host, args.port)
    return serve_folder(args.run, args.host, args.port)


def _track(commands: Any) -> None:
    track = commands.add_parser("track", help="records of runs: import, status")
    actions = track.add_subparsers(dest="action", metavar="ACTION", required=True)
    p = add(
        actions,
        "import",
        track_import,
        "send the records of a run or sweep to a server, what is not there yet; a second time changes nothing",
        [
            "normfree track import runs/c100 --tracking-uri http://mlflow:5000",
            "normfree track import s3://bucket/runs/c100 --tracking-uri http://mlflow:5000",
        ],
    )
    p.add_argument("run", metavar="RUN|SWEEP", help="run or sweep folder, local or in an object store")
    p.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else SQLite in the run folder")
    p.add_argument("--experiment", metavar="NAME", help="default: the one that the run was made for")
    p.add_argument("--run-name", metavar="NAME", help="default: the run's own")
    p = add(
        actions,
        "status",
        track_status,
        "list runs and how they ended; runs whose machine fell silent are marked as failed",
        ["normfree track status runs/c100", "normfree track status --tracking-uri http://mlflow:5000"],
    )
    p.add_argument("run", nargs="?", metavar="URL", help="a run or sweep folder, local or in an object store")
    p.add_argument("--tracking-uri", metavar="URI", help="default: MLFLOW_TRACKING_URI, else SQLite in the folder")
    p.add_argument("--limit", type=number(int, 1), default=100, metavar="N", help="runs to list (default %(default)s)")


@doing("importing")
def track_import(args: argparse.Namespace) -> int:
    """Send the records of a run or sweep, wherever it lies, to a server; 0 all is there, 3 the server did not take all."""
    from orchestration.serve.import_records import fetch, refuse_dead_server, send_run, send_sweep, tracking_uri
    from orchestration.spool.spool import records_folder
    from orchestration.tracking.sweep_records import is_sweep

    folder = records_folder(args.run)
    if is_sweep(args.run):
        if args.experiment or args.run_name:
            raise UserError(
                f"{args.run} is a sweep, which has a parent run and children under names of their own; leave out "
                "--experiment and --run-name"
            )
        uri = tracking_uri(args.tracking_uri, folder)
        refuse_dead_server(uri)
        return send_sweep(args.run, uri)
    fetch(args.run, folder)
    uri = tracking_uri(args.tracking_uri, folder)
    refuse_dead_server(uri)
    return send_run(args.run, folder, uri, experiment=args.experiment, run_name=args.run_name)


@doing("asking the trackers")
def track_status(args: argparse.Namespace) -> int:
    """List a server's runs with how they ended, after ending those that fell silent."""
    from orchestration.serve.import_records import records_of, refuse_dead_server, status_line, tracking_uri
    from orchestration.tracking import heartbeat
    from orchestration.tracking.mlflow_client import connect
    from orchestration.tracking.tracking_uri import sqlite_file

    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or (_tracker_of(args.run) if args.run else None)
    uri = tracking_uri(uri, None) if uri or not args.run else records_of(args.run)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"no MLflow records at {file}; give the folder of a run or sweep that has started, or its URI")
    refuse_dead_server(uri)
    client = connect(uri)
    only = _run_of(args.run, uri) if args.run else None
    experiments = [client.get_run(only).info.experiment_id] if only else heartbeat.all_experiments(client)
    for run_id, why in heartbeat.sweep_once(client, experiments):
        say(f"marked {run_id} as failed: {why}")
    if only:
        say(f"tracker: {public(uri)}", status_line(client.get_run(only)))
        return 0
    for run in client.search_runs(experiments, max_results=args.limit):
        say(status_line(run))
    return 0


def _tracker_of(url: str) -> str | None:
    """The tracker that the folder's `tracking.json` names: the last one that knows the run; None without one."""
    from orchestration.spool.spool import records_folder
    from orchestration.spool.state_file import read_state
    from orchestration.tracking.tracking_uri import server_uri

    folder = records_folder(url).resolve()
    names = [name for name, state in read_state(folder / "tracking.json").items() if state.get("run_id")]
    return server_uri(names[-1], folder) if names else None


def _run_of(url: str, uri: str) -> str:
    """The run of a folder on a tracker, by `tracking.json`. UserError if the tracker has none."""
    from orchestration.spool.spool import records_folder
    from orchestration.spool.state_file import read_state
    from orchestration.tracking.tracking_uri import server_name

    folder = records_folder(url).resolve()
    run_id = read_state(folder / "tracking.json").get(server_name(uri, folder), {}).get("run_id")
    if not run_id:
        raise UserError(
            f"MLflow at {public(uri)} has no run of {url}; 'normfree track import {url}' with this --tracking-uri sends it"
        )
    return str(run_id)
