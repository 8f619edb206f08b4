"""`normfree ui --team`: MLflow for a group. PostgreSQL holds the records, a bucket the files, and everybody has a password.

    trainers ---- http, basic auth ----> mlflow server ----> PostgreSQL (records, users)
                                              '------------> bucket (files: pictures, recipes, scorecards)

Files pass through the server, so trainers need no credentials for its bucket; they are small. Checkpoints never do: runs
hold their URLs and digests. What is secret comes from the environment and stays there: PGPASSWORD (or ~/.pgpass) for the
database, AWS_ACCESS_KEY_ID and its kind for the bucket, MLFLOW_AUTH_ADMIN_PASSWORD for the first user. Who trains sets
MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. TLS is by --certificate and --key, or by a proxy in front.
"""

import importlib.util
import os
import re
import secrets
import ssl
import sys

from orchestration.serve import addresses, mlflow_server
from orchestration.serve.server import free_port, run_server
from orchestration.tracking.upload import cause
from pipeline import places
from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage import objects

ADMIN_PASSWORD = "MLFLOW_AUTH_ADMIN_PASSWORD"
SHORTEST_PASSWORD = 12
KNOWN_PASSWORD = "password1234"
"""The admin's of older MLflow servers, in its public sources."""
ANSWER_S = 15
NEEDS = {"psycopg2": "psycopg2-binary", "boto3": "boto3", "flask_wtf": "Flask-WTF"}
SETTINGS = """[mlflow]
default_permission = READ
database_uri = {database}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def serve_team(
    backend: str | None,
    artifacts: str | None,
    *,
    host: str,
    port: int,
    allowed_hosts: str | None = None,
    workers: int = 4,
    certificate: str | None = None,
    key: str | None = None,
) -> int:
    """Serves until Ctrl-C and returns the exit status. UserError for what is missing or does not answer, before it starts.

    Args:
        backend: postgresql://USER@HOST/DATABASE, without a password.
        artifacts: a folder in a bucket; any fsspec URL that MLflow takes too.
        allowed_hosts: names with commas between that browsers may use for this server besides those of its machine, against
            DNS rebinding.
        certificate: PEM file for TLS, with the chain; its private key there too, or in `key`.
    """
    backend, artifacts = _checked(backend, artifacts)
    if workers < 1:
        raise UserError(f"--workers is {workers}, and a server has at least 1 process")
    tls = _tls(certificate, key)
    port = free_port(host, port)
    if not tls and not addresses.is_loopback(host):
        warning = (
            f"passwords and records travel unencrypted to {host}: give --certificate FILE --key FILE, or let only a proxy "
            "with TLS reach this address"
        )
        print(terminal(warning), file=sys.stderr, flush=True)
    with places.temporary_folder("team") as folder:
        settings = folder / "basic_auth.ini"  # a folder that only we can read
        settings.write_text(SETTINGS.format(database=backend.replace("%", "%%")))
        environment = {
            **tls,
            mlflow_server.ARTIFACTS: artifacts,
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes that nothing of ours asks for anything
        }
        if "MLFLOW_FLASK_SERVER_SECRET_KEY" not in os.environ:
            environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secrets.token_hex(32)  # of forms; one for all workers
        if allowed_hosts:
            environment["MLFLOW_SERVER_ALLOWED_HOSTS"] = allowed_hosts
        return run_server("team", environment, host=host, port=port, uri=backend, workers=workers)


def _tls(certificate: str | None, key: str | None) -> dict[str, str]:
    """The server's variables for TLS. UserError for files that are none, do not fit each other or need a password."""
    if not certificate:
        if key:
            raise UserError(f"--key {key} needs its certificate: give --certificate FILE")
        return {}

    def no_password() -> str:
        raise UserError(f"the key {key or certificate} needs a password; give one without, which only you can read")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=no_password)
    except OSError as error:  # ssl.SSLError too
        raise UserError(
            f"cannot serve TLS with --certificate {certificate}{f' --key {key}' if key else ''} ({cause(error)}); give PEM "
            "files of one certificate and its private key"
        ) from None
    files = {mlflow_server.CERTIFICATE: certificate} | ({mlflow_server.KEY: key} if key else {})
    return {name: os.path.abspath(file) for name, file in files.items()}


def _checked(backend: str | None, artifacts: str | None) -> tuple[str, str]:
    missing = [package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"--team needs {', '.join(missing)}; pip install 'normfree[team]'")
    if not backend or not re.match(r"postgresql(\+psycopg2)?://", backend):
        raise UserError(
            f"--team keeps records in PostgreSQL, and --tracking-uri is {public(backend) if backend else 'not given'}; "
            "write --tracking-uri postgresql://USER@HOST/DATABASE"
        )
    if re.match(r"[^:]+://[^/@]*:[^/@]*@", backend):
        raise UserError(
            f"the password of {public(backend)} stands on the command line for everybody to read; leave it out of "
            "--tracking-uri and set PGPASSWORD"
        )
    if not artifacts or objects.is_local(artifacts):
        raise UserError("--team keeps files in a bucket; write --artifacts s3://BUCKET/FOLDER")
    password = os.environ.get(ADMIN_PASSWORD, "")
    if len(password) < SHORTEST_PASSWORD:
        raise UserError(
            f"{ADMIN_PASSWORD} is {'too short' if password else 'not set'}; it is the password of the user admin: export "
            f"{SHORTEST_PASSWORD} characters or more"
        )
    if password == KNOWN_PASSWORD:
        raise UserError(f"{ADMIN_PASSWORD} is the one that MLflow once came with and no longer takes; export another")
    # SQLAlchemy 2.1 takes a bare postgresql:// for psycopg 3, earlier ones for psycopg2: we say which.
    backend = re.sub(r"^postgresql://", "postgresql+psycopg2://", backend)
    objects.exists(objects.join(artifacts, "any"))  # a bucket or credentials that are wrong are a UserError there
    _refuse_a_dead_database(backend)
    return backend, artifacts.rstrip("/")


def _refuse_a_dead_database(backend: str) -> None:
    """By the driver itself: MLflow tries a wrong password for minutes."""
    import psycopg2

    try:
        psycopg2.connect(backend.replace("+psycopg2", "", 1), connect_timeout=ANSWER_S).close()
    except psycopg2.Error as error:
        raise UserError(f"cannot use {public(backend)} ({cause(error)}); check address, user and PGPASSWORD") from None
