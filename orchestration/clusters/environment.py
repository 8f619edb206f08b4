"""Which variables of whoever launches reach the hosts: a closed list, so that every host gets the same and nothing else."""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestration.child_process import FILES
from orchestration.run.worker import TRACKING_URI
from pipeline.errors import UserError

PREFIXES = (
    "AWS_",
    "AZURE_",
    "MLFLOW_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "FI_",
    "UCX_",
    "PG",
    "FSSPEC_",
    "RAY_AUTH_",
    "NORMFREE_",
    "OMP_",
    "MKL_",
    "KMP_",
)
"""Stores, trackers, networks of a cluster, threads. TORCHELASTIC_ and CUDA_VISIBLE_DEVICES are a host's own."""
NAMES = (
    *FILES,
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "LANG",
    "LC_ALL",
    "TZ",
    "LD_LIBRARY_PATH",
    "TMPDIR",
)
_PUBLIC = re.compile(
    r"(?:AWS_(?:ENDPOINT_URL\w*|REGION|DEFAULT_REGION|PROFILE|CA_BUNDLE|CONFIG_FILE|SHARED_CREDENTIALS_FILE|MAX_ATTEMPTS|RETRY_MODE|REQUEST_CHECKSUM_CALCULATION"
    r"|RESPONSE_CHECKSUM_VALIDATION|EC2_METADATA_DISABLED)|(?:NCCL|GLOO|TORCH|FI|UCX|OMP|MKL|KMP)_\w+|LANG|LC_ALL|TZ|LD_LIBRARY_PATH|TMPDIR|PATH"
    r"|PYTHON\w*|NORMFREE_(?:CACHE|PICTURES|PROFILE|TRACKING_URI)|MLFLOW_TRACKING_URI|\w*_FILE|\w*_PATH|\w*BUNDLE|(?i:no_proxy))"
)
"""Variables whose values may be shown; any other value is taken for a secret."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


def launched(more: Iterable[str] = (), *, tracking_uri: str | None = None, python: str | None = None) -> dict[str, str]:
    """The variables that every host gets.

    Args:
        more: names besides those of the list, which must be set here.
        tracking_uri: where records go; may hold a password.
        python: the interpreter of the hosts, whose folder stands first on PATH.
    Raises:
        UserError: a name of `more` is no name of a variable, or is not set.
    """
    chosen = {
        n: v for n, v in os.environ.items() if n in NAMES or (n.startswith(PREFIXES) and not n.startswith("PGDATA"))
    }
    for name in more:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--env {name[:80]!r} is no name of a variable; give the name alone, its value is taken from this shell"
            )
        if name not in os.environ:
            raise UserError(f"--env {name}: it is not set here; export it, or leave it out")
        chosen[name] = os.environ[name]
    chosen.pop("NORMFREE_UTF8", None)
    chosen[TRACKING_URI] = tracking_uri or ""
    folder = str(Path(python or sys.executable).parent)
    chosen["PATH"] = os.pathsep.join(
        dict.fromkeys([folder, *filter(os.path.isabs, os.environ.get("PATH", os.defpath).split(os.pathsep))])
    )
    chosen["PYTHONUTF8"] = "1"
    return {name: os.path.abspath(v) if name in FILES and v else v for name, v in sorted(chosen.items())}


def is_public(name: str, value: str) -> bool:
    """Whether the value may be shown, and may stand in a manifest that is kept in a repository."""
    from pipeline.secrets import has_secret

    return not value or (_PUBLIC.fullmatch(name) is not None and not has_secret(value))


def shown(variables: Mapping[str, str]) -> list[str]:
    """NAME=value a line; of what may be a secret, the name."""
    return [
        f"{name}={value}" if is_public(name, value) else f"{name}=(its value here, not shown)"
        for name, value in variables.items()
    ]
