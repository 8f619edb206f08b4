"""What the registry gives back, and how it is asked."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestration.tracking.heartbeat import pages
from orchestration.tracking.lineage import DIGEST
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.upload import cause
from pipeline.errors import UserError
from pipeline.secrets import public

NAME_SIGNS = ('"', "/", ":", "@")
"""MLflow refuses / and :, its filters cannot hold both kinds of quotes, and @ begins an alias."""


@dataclass(frozen=True, kw_only=True)
class RegisteredVersion:
    """One version of a registered model."""

    name: str
    version: str
    source: str
    """URL of the checkpoint."""
    digest: str
    """SHA-256 of its commit file."""
    is_new: bool = False
    """Made by this call; otherwise the same checkpoint was there under this name."""
    note: str = ""
    """What did not go as it should and does no harm: the checkpoint could not be pinned."""


@dataclass(frozen=True, kw_only=True)
class Unregistered:
    """What `unregister` did."""

    version: RegisteredVersion | None = None
    """That was deleted."""
    unpinned: list[str] = field(default_factory=list)
    """Checkpoints that were kept for it, or for versions deleted before."""
    kept: dict[str, list[str]] = field(default_factory=dict)
    """Checkpoint -> why it is kept all the same; [] where its run may delete it now."""
    note: str = ""


def check_names(name: str, alias: str | None) -> None:
    """What MLflow refuses, or would take and nobody could write as models:/NAME@ALIAS, before anything is made."""
    wrong = [c for c in NAME_SIGNS if c in name] or [c for c in name if not c.isprintable()]
    if wrong:
        raise UserError(
            f"the model's name {name!r} has {wrong[0]!r} in it; write it in letters, digits, dashes and spaces"
        )
    if not name.strip() or name != name.strip():
        raise UserError(f"the model's name is {name!r}; write one that is not empty and has no spaces around it")
    if alias and (not re.fullmatch(r"[\w-]+", alias, re.ASCII) or re.fullmatch(r"latest|v\d+", alias, re.I)):
        raise UserError(
            f"the alias {alias!r} is none that MLflow takes; write it in letters, digits, dashes and underscores, other than "
            "'latest' and 'v' with a number"
        )


def find_version(client: Any, name: str, digest: str) -> RegisteredVersion | None:
    """The version under this name with this digest; a second registration, or one after a kill, makes no second version."""
    # MLflow's filters have no escapes: a name is quoted with the sign that it does not hold (`check_names`).
    quote = '"' if "'" in name else "'"
    for made in pages(lambda **page: client.search_model_versions(f"name={quote}{name}{quote}", **page)):
        if made.name == name and dict(made.tags).get(DIGEST) == digest:
            return RegisteredVersion(name=name, version=str(made.version), source=str(made.source), digest=digest)
    return None


def make_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def asking(uri: str, absent: str = "") -> Iterator[Any]:
    """A client, with the server's refusals as sentences; `absent`: what to say where it does not know what was asked for."""
    from mlflow.exceptions import MlflowException

    try:
        yield connect(uri)
    except MlflowException as error:
        code = error.error_code
        if absent and code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(
                f"{absent} in {public(uri)} ({cause(error)}); look at its models with 'normfree ui'"
            ) from None
        raise UserError(
            f"MLflow at {public(uri)} says: {cause(error)}; mend that and run the same command again"
        ) from None
