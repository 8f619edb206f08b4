"""Checkpoints under a name in MLflow's model registry, which gets to know where the bytes lie and what they are, not the bytes.

A version's `source` is the checkpoint's own URL; its tags hold the SHA-256 of the commit file (which names every other byte), the
recipe, the lineage and the scorecard. Whoever takes a version is given what was registered or nothing: a commit file with
another digest is refused. A registered checkpoint is pinned, so that its run does not delete it, until `unregister`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestration.registry import version_facts
from orchestration.tracking import lineage
from orchestration.tracking.lineage import DIGEST
from orchestration.tracking.mlflow_client import connect
from orchestration.tracking.tracking_uri import resolve_uri, sqlite_file, sqlite_uri
from orchestration.tracking.translate import cause
from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import load as checkpoint_load
from pipeline.checkpoint import pull, retention
from pipeline.errors import UserError
from pipeline.models.backbone import LoadedBackbone, load_backbone
from pipeline.secrets import public
from pipeline.storage import objects

SCHEME = "models:/"
SOURCE_CHARACTERS = 500
NAME_SIGNS = ('"', "/", ":", "@")
"""MLflow refuses / and :, its filters cannot hold both kinds of quotes, and @ begins an alias."""


@dataclass(frozen=True, kw_only=True)
class Version:
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

    version: Version | None = None
    """That was deleted."""
    unpinned: list[str] = field(default_factory=list)
    """Checkpoints that were kept for it, or for versions deleted before."""
    kept: dict[str, list[str]] = field(default_factory=dict)
    """Checkpoint -> why it is kept all the same; [] where its run may delete it now."""
    note: str = ""


def is_name(url: str) -> bool:
    """Whether `url` names a registered model."""
    return url.startswith(SCHEME)


def register(
    url: str,
    name: str,
    *,
    alias: str | None = None,
    scorecard: str | None = None,
    tracking_uri: str | None = None,
    cache_dir: str | None = None,
) -> Version:
    """Register a checkpoint, or the newest one of a run, after every byte of it was verified.

    Args:
        alias: set to this version, moved from another if it was there.
        scorecard: URL of a sweep on this very checkpoint.
    Raises:
        UserError: nothing that verifies, a sweep on other weights, a server that cannot be reached, refuses the name or the
            alias, or could not reach a local path. Nothing is registered then.
    """
    _check_names(name, alias)
    uri = _tracking_uri(tracking_uri)
    cache = cache_dir or checkpoint_load.default_cache()
    commit = checkpoint_load.resolve(url, cache)
    source = _source(commit.url, uri)
    checkpoint_load.verify(commit, cache)
    tags, rows = version_facts.tags_of(commit), []
    if scorecard:
        rows = version_facts.scorecard_rows(scorecard, commit)
        report = public(objects.join(scorecard, "report"))
        tags |= {"scorecard": report, "scorecard.rows": version_facts.rows_tag(rows)}
    with _asking(uri) as client:
        found, why = _registered(client, name, commit.digest), _reason(name, uri)
        is_pinned, note = _pin(commit.url, why)  # also for a version that is there: its pin may be gone
        try:
            if found is None:
                run = lineage.run_of(client, commit.digest)
                tags |= version_facts.origin_tags(run, commit)
                _make_name(client, name)
                page, run_id = version_facts.description(commit, rows), run.info.run_id if run else None
                made = client.create_model_version(
                    name, source, run_id=run_id, tags=tags, description=page, await_creation_for=0
                )
                found = Version(
                    name=name, version=str(made.version), source=source, digest=commit.digest, is_new=True, note=note
                )
            else:
                found = replace(found, note=note)
                for key, value in tags.items():  # the scorecard may be newer than the version
                    client.set_model_version_tag(name, found.version, key, value)
            if alias:
                client.set_registered_model_alias(name, alias, found.version)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong first is what is told
                if found is not None and found.is_new:
                    client.delete_model_version(name, found.version)
                if is_pinned:
                    retention.unpin(commit.url, why)
            raise
        if run_id := client.get_model_version(name, found.version).run_id:
            lineage.link_version(client, run_id, name, found.version, commit.digest)
    return found


def _check_names(name: str, alias: str | None) -> None:
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


def find(uri: str, tracking_uri: str | None = None) -> Version:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for. Changes nothing."""
    match = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise UserError(f"{uri} names no version of a model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    where = _tracking_uri(tracking_uri)
    file = sqlite_file(where)
    if file is not None and not file.exists():  # MLflow would make an empty one
        raise UserError(f"no MLflow records at {file}; set --tracking-uri to where the model was registered")
    with _asking(where, f"{uri} is not there") as client:
        made = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    digest = dict(made.tags).get(DIGEST)
    if not digest:
        raise UserError(
            f"{uri} was not registered by 'normfree register' (it has no tag {DIGEST}); register its checkpoint"
        )
    return Version(name=name, version=str(made.version), source=str(made.source), digest=str(digest))


def unregister(target: str, tracking_uri: str | None = None) -> Unregistered:
    """Take a version out of the registry and unpin its checkpoint, whose bytes stay where they are.

    `target`: models:/NAME@ALIAS or models:/NAME/VERSION; or the URL of a checkpoint or run folder, which deletes nothing and
    takes back the pins of versions that somebody has deleted in MLflow's pages. Raises UserError as `find`.
    """
    uri = _tracking_uri(tracking_uri)
    if not is_name(target):
        return _release(target, uri)
    version = find(target, uri)
    with _asking(uri) as client:
        run_id = client.get_model_version(version.name, version.version).run_id
        client.delete_model_version(version.name, version.version)
        if run_id:
            lineage.unlink_version(client, run_id, version.name, version.version)
    why = _reason(version.name, uri)
    try:
        retention.unpin(version.source, why)
        return Unregistered(
            version=version, unpinned=[version.source], kept={version.source: retention.pins(version.source)}
        )
    except (OSError, UserError) as error:
        note = f"it is still pinned ({' '.join(str(error).split())[:200]}); normfree unregister {version.source} tries again"
        return Unregistered(version=version, note=note)


def _release(url: str, uri: str) -> Unregistered:
    """Unpin the checkpoints at `url` that this tracker has no version of any more."""
    is_one = objects.exists(objects.join(url, checkpoint.COMMIT))
    found = [url.rstrip("/")] if is_one else checkpoint.committed(url)
    if not found:
        raise UserError(f"no checkpoint at {url}; give a checkpoint, a run folder, or models:/NAME/VERSION")
    unpinned, kept = [], {}
    with _asking(uri) as client:
        for place in found:
            digest = checkpoint.read_commit(place).digest
            for why in retention.pins(place):
                match = re.fullmatch(r"registered as (.+) in (\S+)", why)
                is_ours = match is not None and _place(match[2]) == _place(uri)
                if match and is_ours and _registered(client, match[1], digest) is None:
                    retention.unpin(place, why)
                    unpinned.append(place)
            kept[place] = retention.pins(place)
    return Unregistered(unpinned=unpinned, kept=kept)


def load(
    url: str,
    *,
    weights: Literal["evaluated", "ema", "raw"] = "evaluated",
    tracking_uri: str | None = None,
    cache_dir: str | None = None,
) -> LoadedBackbone:
    """The network of a registered model, of a checkpoint or of a run, from anywhere, verified and in evaluation mode.

    `load("models:/digits@champion").model(images)`: images as the run's evaluation makes them; logits in the order of
    `.classes`. What was fetched once is kept in `cache_dir` by its digest. Raises UserError as `find` and `pull.pull`.
    """
    if not is_name(url):
        return load_backbone(url, weights)
    version = find(url, tracking_uri)
    folder = Path(cache_dir or checkpoint_load.default_cache()) / "pulled" / version.digest
    pull.pull(version.source, folder, digest=version.digest)
    return load_backbone(str(folder), weights)


def _tracking_uri(given: str | None) -> str:
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "no MLflow: set --tracking-uri to a server or to sqlite:///PATH/mlflow.db, or MLFLOW_TRACKING_URI"
        )
    return resolve_uri(uri, ".")


def _source(url: str, uri: str) -> str:
    """The checkpoint's URL as others can use it."""
    if objects.is_local(url):
        if uri.startswith(("http://", "https://")):
            raise UserError(
                f"{url} is on this machine, where users of the server {public(uri)} cannot fetch it; copy the run to object "
                "storage and register it from there"
            )
        url = objects.local_path(url).resolve().as_uri()
    if len(url) > SOURCE_CHARACTERS:
        raise UserError(
            f"the URL of the checkpoint has {len(url)} characters, MLflow takes {SOURCE_CHARACTERS}; shorten it"
        )
    return url


def _reason(name: str, uri: str) -> str:
    """The line that keeps a registered checkpoint."""
    return f"registered as {name} in {_place(uri)}"


def _place(uri: str) -> str:
    """A tracker's name for people and for comparison: without passwords, a file by its whole path."""
    file = sqlite_file(uri)
    return sqlite_uri(file) if file is not None else public(uri).rstrip("/")


def _pin(url: str, why: str) -> tuple[bool, str]:
    """(whether this pinned it, what to say where it could not be)."""
    try:
        if why in retention.pins(url):
            return False, ""
        retention.pin(url, why)
    except (OSError, UserError) as error:
        if not objects.exists(objects.join(url, checkpoint.COMMIT)):
            raise
        return False, f"it could not be pinned, so its run may delete it ({' '.join(str(error).split())[:200]})"
    return True, ""


def _registered(client: Any, name: str, digest: str) -> Version | None:
    """The version under this name with this digest; a second registration, or one after a kill, makes no second version."""
    # MLflow's filters have no escapes: a name is quoted with the sign that it does not hold (`_check_names`).
    quote, page = '"' if "'" in name else "'", None
    while True:
        found = client.search_model_versions(f"name={quote}{name}{quote}", page_token=page)
        for made in found:
            if made.name == name and dict(made.tags).get(DIGEST) == digest:
                return Version(name=name, version=str(made.version), source=str(made.source), digest=digest)
        page = found.token
        if not page:
            return None


def _make_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def _asking(uri: str, absent: str = "") -> Iterator[Any]:
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
