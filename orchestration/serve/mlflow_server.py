"""MLflow's server behind a guard of ours: `python -m orchestration.serve.mlflow_server own|team HOST PORT WORKERS`.

Form, address and number of processes are arguments; the store's URI, the folder of files, the token and passwords come by the
environment. `MLFLOW_SERVER_ALLOWED_HOSTS` adds names to those of this machine.
"""

import os
import signal
import sys
from typing import Any

from orchestration.child_process import die_with
from orchestration.serve import addresses
from orchestration.serve.own_guard import Guard
from orchestration.serve.team_guard import LoginLimit, confine_files
from pipeline.display import terminal

TOKEN, ARTIFACTS = "NORMFREE_UI_TOKEN", "NORMFREE_UI_ARTIFACTS"
"""Variables: the token of the own form, and where the files lie that clients send through the server."""
CERTIFICATE, KEY, WORKERS = "NORMFREE_UI_CERTIFICATE", "NORMFREE_UI_KEY", "NORMFREE_UI_WORKERS"


def own() -> Any:
    """The application of `normfree ui`."""
    from mlflow.server.fastapi_app import app

    return Guard(app, os.environ[TOKEN])


def team() -> Any:
    """The application of `normfree ui --team`, in each of its processes."""
    die_with(os.getppid(), signal.SIGKILL)
    confine_files(os.environ[ARTIFACTS])
    from mlflow.server.auth import create_app

    return LoginLimit(create_app(), num_processes=int(os.environ[WORKERS]))


def _set_names(scheme: str, host: str, port: int) -> None:
    """Names under which browsers may call this server. Before MLflow's server is imported, which reads them then.

    By itself MLflow knows local names alone, and takes a page's own requests under any other name for another site's.
    """
    given = [name.strip() for name in os.environ.get("MLFLOW_SERVER_ALLOWED_HOSTS", "").split(",") if name.strip()]
    hosts, origins = addresses.allowed(scheme, addresses.names(host), port, given)
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join([*addresses.LOCAL_HOSTS, *hosts])
    more = os.environ.get("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS")
    os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join([*origins, *([more] if more else [])])


def _prepare() -> None:
    """What 'mlflow server' hands to its workers."""
    from mlflow.server import constants, handlers

    uri, root = os.environ["MLFLOW_BACKEND_STORE_URI"], "mlflow-artifacts:/"
    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = uri
    os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = root
    os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = os.environ[ARTIFACTS]
    os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
    handlers.initialize_backend_stores(uri, uri, root)


def _set_admin() -> None:
    """MLflow makes the admin once and overlooks any other password afterwards."""
    from mlflow.server.auth import auth_config, bootstrap_admin_user, store

    bootstrap_admin_user()
    name, password = auth_config.admin_username, auth_config.admin_password
    if not store.authenticate_user(name, password):
        store.update_user(name, password=password)
        said = f"the user {name} had another password; it is the one in MLFLOW_AUTH_ADMIN_PASSWORD from now on"
        print(terminal(said), flush=True)
    os.environ["_MLFLOW_AUTH_ADMIN_BOOTSTRAPPED"] = "true"


def main() -> None:
    form, host, port, workers = sys.argv[1:]
    certificate = os.environ.get(CERTIFICATE)
    import uvicorn

    os.environ[WORKERS] = workers
    _set_names("https" if certificate else "http", host, int(port))
    if form == "team":
        confine_files(os.environ[ARTIFACTS])  # before the store is opened; a single process serves from this one
    _prepare()
    if form == "team":
        _set_admin()
    uvicorn.run(
        f"orchestration.serve.mlflow_server:{form}",
        factory=True,
        host=host,
        port=int(port),
        workers=int(workers),
        log_level="warning",
        # In the own form headers of proxies would say who a client is in the client's own words.
        proxy_headers=form == "team",
        ssl_certfile=certificate,
        ssl_keyfile=os.environ.get(KEY),
    )


if __name__ == "__main__":
    main()
