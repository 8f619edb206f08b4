"""A Ray of this process's own on this machine: reached by nobody else, and gone with this process however it ends.

address     the loopback interface only, for every port of every one of its processes
token       a fresh one in the environment; Ray would write one that it makes to ~/.ray/auth_token with the umask's mode
folder      private (0700), short enough for Unix sockets, removed at the end; kept and named where a worker has died
processes   `orchestration.tune.ray_guard` kills what a killed driver leaves: Ray's agents outlive their raylet by a minute
"""

import contextlib
import logging
import os
import secrets
import shutil
import site
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray._private import services
from ray._raylet import AuthenticationTokenLoader, Config
from ray.tune.execution import class_cache

from orchestration import child_process
from orchestration.tune import ray_guard
from pipeline.display import terminal
from pipeline.errors import UserError

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
LOOPBACK = "127.0.0.1"
MAX_BASE_CHARS = 20
"""Of the folder that holds Ray's: a Unix socket's path has at most 107 characters, and Ray adds some 70."""
SECRETS_IN_LOGS = frozenset(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN"))


def keep_secrets_out_of_logs() -> None:
    """Tune (2.60) copies these variables into each trial's runtime environment, which Ray's agent logs in clear text.

    Workers inherit them all the same from the raylet; on a cluster each node has its own.
    """
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(SECRETS_IN_LOGS)


@dataclass
class LocalRay:
    """The Ray that runs."""

    folder: str
    """Of its sockets and logs."""
    keep_logs: bool = False
    """Set it before the end, and the folder stays."""


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[LocalRay]:
    """Start it, and end it with all of its processes."""
    found = LocalRay(tempfile.mkdtemp(prefix="nf-ray-", dir=_base()))
    mark = secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: None if found.keep_logs else shutil.rmtree(found.folder, ignore_errors=True))
        # Whatever the user has set for clusters: this Ray talks to nobody but us.
        stack.enter_context(_variables(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)))
        stack.enter_context(_guard(f"{ray_guard.MARK}={mark}", found.folder))
        stack.callback(ray.shutdown)
        _read_token_again()
        # The mark is for Ray's processes, and not for what this one starts later. Where memory runs out the kernel ends a worker,
        # which a sweep survives; Ray's own monitor would end it in a way that ends all of Tune.
        own = {ray_guard.MARK: mark, "RAY_memory_monitor_refresh_ms": "0"}
        with workers_import_this_package(), _loopback(), _variables(**own):
            _start(num_cpus, os.path.join(found.folder, "r"))  # Ray opens its folder to everybody
        yield found


def _start(num_cpus: int, folder: str) -> None:
    """UserError where Ray does not come up: its limits are in seconds, and a machine may be too busy for them."""
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=256 << 20,  # configurations travel, images do not
            _node_ip_address=LOOPBACK,
            _temp_dir=folder,
            **QUIET,
        )
    except Exception as error:
        raise UserError(
            f"Ray did not start on this machine ({terminal(error, max_characters=300)}): it may lack processor time, memory, or "
            f"room in {_base()}; make some, and the same command goes on"
        ) from error


def _base() -> str:
    asked = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return asked if len(asked) <= MAX_BASE_CHARS else "/tmp"


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _read_token_again() -> None:
    """Ray's C++ side has read mode and token when it was imported."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _loopback() -> contextlib.AbstractContextManager[Any]:
    """Ray's servers bind to loopback where the node's address is loopback, and `ray.init` replaces that one by the outer one."""
    return mock.patch.object(services, "resolve_ip_for_localhost", lambda host: host)


def workers_import_this_package() -> contextlib.AbstractContextManager[None]:
    """Ray puts the folder in which `ray.init` is called first on its workers' path, on every node of a cluster.

    From a checkout it is to be the checkout's, or they would import what happens to be installed there; and never one that the
    user stands in, who may have a `pipeline` of his own.
    """
    installed = {Path(p).resolve() for p in (*site.getsitepackages(), site.getusersitepackages())}
    return contextlib.chdir("/" if child_process.ROOT in installed else child_process.ROOT)


@contextlib.contextmanager
def _guard(mark: str, folder: str) -> Iterator[None]:
    """The process that ends this Ray if we cannot; it hears of our end through a pipe, whose other end we alone hold."""
    theirs, ours = os.pipe()
    try:
        guard = child_process.start(
            "orchestration.tune.ray_guard",
            [str(theirs), folder],
            on_parent_death=None,
            own_session=True,
            pass_fds=[theirs],
        )
    finally:
        os.close(theirs)
    with os.fdopen(ours, "w") as pipe:
        pipe.write(f"{mark}\n")
        pipe.flush()
        try:
            yield
        finally:
            pipe.write("ended\n")
    guard.wait()
