"""Start a Python process of ours safely: the one door for ranks, samplers, uploaders, figures and servers.

    start("orchestration.run.worker", [...])  ->  python -P -m orchestration.child_process PARENT SIGNAL MODULE ...

The child imports only from where this package and its libraries are installed (`-P`, and PYTHONSAFEPATH for its own children),
never from the folder that it works in, which by default holds nothing that anybody else could have put there. What is secret
goes by `environment`: a command line is for every user of the machine to read. Unless it is to outlive its parent, Linux ends
it when the parent ends, however that ends and whether or not the child is stopped.

This module runs first in each child and therefore imports the standard library alone. Workers of `multiprocessing` are started
by Python itself: `use_safe_path` covers these.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline.secrets import refuse_secrets

ROOT = Path(__file__).resolve().parents[1]
"""Where this package is imported from: site-packages, or a checkout."""
IS_CHECKOUT = ROOT.name not in ("site-packages", "dist-packages")
"""Another interpreter is to be told of it."""
FOLDER = Path(sys.prefix)
"""Where children work unless told otherwise: whoever can write there has the interpreter already. Nothing is written to it."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""linux/prctl.h"""
FILES = (
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "CURL_CA_BUNDLE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "MLFLOW_AUTH_CONFIG_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "PGPASSFILE",
    "PGSERVICEFILE",
    "PGSSLCERT",
    "PGSSLKEY",
    "PGSSLROOTCERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
)
"""Variables that name a file, perhaps from the folder that the parent works in."""


def start(
    module: str,
    arguments: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    on_parent_death: signal.Signals | None = signal.SIGKILL,
    own_session: bool = False,
    pass_fds: Sequence[int] = (),
    output: IO[bytes] | None = None,
    pipe_output: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts `python -m module arguments` with an empty standard input.

    Args:
        environment: variables besides those of this process. Secrets go here.
        folder: where the child works; None = `FOLDER`, so paths among the arguments must be absolute.
        on_parent_death: what it gets when the thread that calls this, or its process, ends; None = it outlives them.
        own_session: signals of the terminal (Ctrl-C) do not reach it, and its process group has its number.
        output: for standard output and error; None = where those of this process go.
        pipe_output: both can be read from `stdout` of what is returned.
    Raises:
        UserError: an argument holds credentials.
    """
    return subprocess.Popen(
        command(module, arguments, on_parent_death=on_parent_death),
        env=child_environment(environment),
        cwd=folder or FOLDER,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if pipe_output else output,
        stderr=subprocess.STDOUT if pipe_output else output,
        pass_fds=pass_fds,
        start_new_session=own_session,
    )


def command(module: str, arguments: Sequence[str], *, on_parent_death: signal.Signals | None) -> tuple[str, ...]:
    """The words by which this process starts `module`, for whoever does that in its place; as in `start`."""
    refuse_secrets(list(arguments), f"the command line of {module}")
    number = 0 if on_parent_death is None else int(on_parent_death)
    words = (sys.executable, "-P", "-m", "orchestration.child_process", str(os.getpid()), str(number), module)
    return (*words, *arguments)


def changed_environment(more: Mapping[str, str]) -> dict[str, str]:
    """What of `child_environment` differs from this process's variables."""
    return {name: text for name, text in child_environment(more).items() if os.environ.get(name) != text}


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables and `more`, with nothing in them that means another thing in another folder."""
    variables = {**os.environ, **(more or {}), "PYTHONSAFEPATH": "1"}
    # An empty or relative entry would be the child's working folder, or something below it.
    roots = [p for p in variables.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p)]
    if IS_CHECKOUT and str(ROOT) not in roots:
        roots.insert(0, str(ROOT))
    variables["PYTHONPATH"] = os.pathsep.join(roots)
    for name in FILES:
        if variables.get(name):
            variables[name] = os.path.abspath(variables[name])
    return variables


def use_safe_path() -> None:
    """From here on no Python that this process starts imports from the folder it is started in: workers of `multiprocessing`
    (which run `python -c`), Ray's, compilers'."""
    os.environ["PYTHONSAFEPATH"] = "1"


@contextmanager
def rank_variables(num_processes: int) -> Iterator[dict[str, str]]:
    """The variables by which `num_processes` ranks on this machine find each other, but for RANK and LOCAL_RANK.

    The store through which they find and watch each other is this process's and outlives each of them: in a folder that no other
    user enters. The ranks' own connections (gloo) are on the loopback.
    """
    from pipeline import places
    from pipeline.exchange import unix_store

    with places.temporary_folder("store", within=places.socket_folder()) as folder, closing(unix_store.Server(folder)):
        yield {
            unix_store.FOLDER: str(folder),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",  # nobody listens there: all launchers set it, and no library of ours asks it for anything
            # The name is that of torch's own launcher, and means that nobody need host another store.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "GLOO_SOCKET_IFNAME": "lo",
        }


def listening_store(address: str, port: int = 0) -> Any:
    """A `torch.distributed.TCPStore` of this process that listens on this address alone; port 0: a free one.

    Raises:
        OSError: the address is none of this machine, or the port is taken.
    """
    import socket

    from torch.distributed import TCPStore

    # By itself the store listens on every interface of the machine, whatever host it is given.
    with socket.create_server((address, port)) as listener:
        number = listener.getsockname()[1]
        return TCPStore(
            address,
            number,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=True,
        )


def processes_with(mark: str) -> list[int]:
    """Those of this user with a variable ("NAME=value") that begins so at their start, this process and its parent excepted."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or it has just ended; that of a zombie is empty
            if any(text.startswith(mark.encode()) for text in (entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    return [pid for pid in found if pid not in (os.getpid(), os.getppid())]


def cores() -> int:
    """Cores that this process, and so its children, may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with(parent: int, number: int) -> None:
    """Get this signal when `parent` ends; before anything else, so that the only moment that the kernel does not watch is
    checked afterwards."""
    if number and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)


def adopt_orphans() -> None:
    """From here on what its children leave behind becomes this process's own, and not that of the machine's first process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def main() -> Any:
    parent, number, module, *arguments = sys.argv[1:]
    die_with(int(parent), int(number))
    sys.argv = [module, *arguments]
    return runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
