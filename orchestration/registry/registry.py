"""Checkpoints under a name in MLflow's model registry, which gets to know where the bytes lie and what they are, not the bytes.

A version's `source` is the checkpoint's own URL; its tags hold the SHA-256 of the commit file (which names every other byte), the
recipe, the lineage and the scorecard. Whoever takes a version is given what was registered or nothing: a commit file with
another digest is refused. A registered checkpoint is pinned, so that its run does not delete it, until `unregister`.
"""

import contextlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from orchestration.registry import version_facts
from orchestration.registry.pins import pin_for, pin_reason, tracker_name
from orchestration.registry.versions import (
    RegisteredVersion,
    Unregistered,
    asking,
    check_names,
    find_version,
    make_name,
)
from orchestration.tracking import lineage
from orchestration.tracking.lineage import DIGEST
from orchestration.tracking.tracking_uri import resolve_uri, sqlite_file
from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import load as checkpoint_load
from pipeline.checkpoint import pull, retention
from pipeline.errors import UserError
from pipeline.models.backbone import LoadedBackbone, load_backbone
from pipeline.secrets import public
from pipeline.storage import objects

SCHEME = "models:/"
SOURCE_CHARACTERS = 500


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
) -> RegisteredVersion:
    """Register a checkpoint, or the newest one of a run, after every byte of it was verified.

    Args:
        alias: set to this version, moved from another if it was there.
        scorecard: URL of a sweep on this very checkpoint.
    Raises:
        UserError: nothing that verifies, a sweep on other weights, a server that cannot be reached, refuses the name or the
            alias, or could not reach a local path. Nothing is registered then.
    """
    check_names(name, alias)
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
    with asking(uri) as client:
        found, why = find_version(client, name, commit.digest), pin_reason(name, uri)
        is_pinned, note = pin_for(commit.url, why)  # also for a version that is there: its pin may be gone
        try:
            if found is None:
                run = lineage.run_of(client, commit.digest)
                tags |= version_facts.origin_tags(run, commit)
                make_name(client, name)
                page, run_id = version_facts.description(commit, rows), run.info.run_id if run else None
                made = client.create_model_version(
                    name, source, run_id=run_id, tags=tags, description=page, await_creation_for=0
                )
                found = RegisteredVersion(
                    name=name, version=str(made.version), source=source, digest=commit.digest, is_new=True, note=note
                )
            else:
                found = replace(found, note=note)
                for key, value in tags.items():  # the scorecard may be newer than the version
                    client.set_model_version_tag(name, found.version, key, value)
            if alias:
                client.set_registered_model_alias(name, alias, found.version)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong first is what is reported
                if found is not None and found.is_new:
                    client.delete_model_version(name, found.version)
                if is_pinned:
                    retention.unpin(commit.url, why)
            raise
        if run_id := client.get_model_version(name, found.version).run_id:
            lineage.link_version(client, run_id, name, found.version, commit.digest)
    return found


def find(uri: str, tracking_uri: str | None = None) -> RegisteredVersion:
    """The version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` stands for. Changes nothing."""
    match = re.fullmatch(r"models:/+([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if match is None:
        raise UserError(f"{uri} names no version of a model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = match.groups()
    where = _tracking_uri(tracking_uri)
    file = sqlite_file(where)
    if file is not None and not file.exists():  # MLflow would make an empty one
        raise UserError(f"no MLflow records at {file}; set --tracking-uri to where the model was registered")
    with asking(where, f"{uri} is not there") as client:
        made = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    digest = dict(made.tags).get(DIGEST)
    if not digest:
        raise UserError(
            f"{uri} was not registered by 'normfree register' (it has no tag {DIGEST}); register its checkpoint"
        )
    return RegisteredVersion(name=name, version=str(made.version), source=str(made.source), digest=str(digest))


def unregister(target: str, tracking_uri: str | None = None) -> Unregistered:
    """Take a version out of the registry and unpin its checkpoint, whose bytes stay where they are.

    `target`: models:/NAME@ALIAS or models:/NAME/VERSION; or the URL of a checkpoint or run folder, which deletes nothing and
    takes back the pins of versions that somebody has deleted in MLflow's pages. Raises UserError as `find`.
    """
    uri = _tracking_uri(tracking_uri)
    if not is_name(target):
        return _release(target, uri)
    version = find(target, uri)
    with asking(uri) as client:
        run_id = client.get_model_version(version.name, version.version).run_id
        client.delete_model_version(version.name, version.version)
        if run_id:
            lineage.unlink_version(client, run_id, version.name, version.version)
    why = pin_reason(version.name, uri)
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
    with asking(uri) as client:
        for place in found:
            digest = checkpoint.read_commit(place).digest
            for why in retention.pins(place):
                match = re.fullmatch(r"registered as (.+) in (\S+)", why)
                is_ours = match is not None and tracker_name(match[2]) == tracker_name(uri)
                if match and is_ours and find_version(client, match[1], digest) is None:
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
