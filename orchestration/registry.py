"""Checkpoints under a name in MLflow's model registry, which gets to know where the bytes lie and what they are, not the bytes.

A version's `source` is the checkpoint's own URL; its tags hold the SHA-256 of the commit file (which names every other byte), the
recipe, the lineage and the scorecard. Whoever takes a version is given what was registered or nothing: a commit file with
another digest is refused. A registered checkpoint is pinned, so that its run does not delete it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestration.tracking import connect, resolve_uri, sqlite_file
from orchestration.tracking_records import cause, public
from pipeline import checkpoint, pull, retention, storage
from pipeline.backbone import LoadedBackbone, load_backbone
from pipeline.checkpoint import Commit
from pipeline.errors import UserError

DIGEST = "normfree.digest"
SCHEME = "models:/"
DESCRIPTION_CHARACTERS = 4900  # the column holds 5,000
SOURCE_CHARACTERS = 500


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
        UserError: nothing that verifies, a sweep on other weights, a server that cannot be reached, refuses the name or could
            not reach a local path. Nothing is registered then.
    """
    uri = _tracking_uri(tracking_uri)
    cache = cache_dir or checkpoint.default_cache()
    commit = checkpoint.resolve(url, cache)
    source = _source(commit.url, uri)
    checkpoint.verify(commit, cache)
    tags, rows = _tags(commit), []
    if scorecard:
        rows = _scorecard(scorecard, commit)
        tags |= {"scorecard": public(storage.join(scorecard, "report")), "scorecard.rows": json.dumps(rows)}
    with _asking(uri) as client:
        found = _registered(client, name, commit.digest)
        if found is None:
            run_id, lineage = _lineage(client, commit)
            tags |= lineage
            was_pinned, note = _pin(commit.url, f"registered as {name} in {public(uri)}")
            try:
                _make_name(client, name)
                made = client.create_model_version(
                    name, source, run_id=run_id, tags=tags, description=_description(commit, rows), await_creation_for=0
                )
            except BaseException:
                if not was_pinned:
                    storage.remove(storage.join(commit.url, retention.KEEP))
                raise
            found = Version(
                name=name, version=str(made.version), source=source, digest=commit.digest, is_new=True, note=note
            )
        else:
            for key, value in tags.items():  # the scorecard may be newer than the version
                client.set_model_version_tag(name, found.version, key, value)
        if alias:
            client.set_registered_model_alias(name, alias, found.version)
    return found


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
    folder = Path(cache_dir or checkpoint.default_cache()) / "pulled" / version.digest
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
    if storage.is_local(url):
        if uri.startswith(("http://", "https://")):
            raise UserError(
                f"{url} is on this machine, where users of the server {public(uri)} cannot fetch it; copy the run to object "
                "storage and register it from there"
            )
        url = storage.local_path(url).resolve().as_uri()
    if len(url) > SOURCE_CHARACTERS:
        raise UserError(
            f"the URL of the checkpoint has {len(url)} characters, MLflow takes {SOURCE_CHARACTERS}; shorten it"
        )
    return url


def _pin(url: str, why: str) -> tuple[bool, str]:
    """(whether it was pinned before, what to say where it could not be)."""
    if storage.exists(storage.join(url, retention.KEEP)):
        return True, ""
    try:
        retention.pin(url, why)
    except (OSError, UserError) as error:
        if not storage.exists(storage.join(url, checkpoint.COMMIT)):
            raise
        return False, f"it could not be pinned, so its run may delete it ({' '.join(str(error).split())[:200]})"
    return False, ""


def _tags(commit: Commit) -> dict[str, str]:
    config, dataset = commit.config, commit.dataset
    tags = {
        DIGEST: commit.digest,
        "step": str(commit.step),
        "samples": str(commit.samples),
        "size_bytes": str(commit.size_bytes),
        "num_classes": str(len(commit.classes)),
        "model": str(config["model"]["name"]),
        "recipe": str(config.get("name", "")),
        "config_digest": commit.config_digest,
        "dataset": str(dataset.get("name", "")),
        "dataset.url": str(dataset.get("url", "")),
        "dataset.digest": str(dataset.get("digest", "")),
        **{f"eval.{name}": f"{value:.6g}" for name, value in commit.evaluation.items()},
    }
    return {key: public(value) for key, value in tags.items() if value}


def _scorecard(sweep: str, commit: Commit) -> list[dict[str, Any]]:
    from transfer.ledger import Ledger
    from transfer.report import load_entries
    from transfer.report import scorecard as rows_of

    theirs = Ledger(sweep).info().checkpoint_digest
    if theirs != commit.digest:
        raise UserError(
            f"the sweep {sweep} is about another checkpoint (digest {theirs[:12]}) than {commit.url} ({commit.digest[:12]}); "
            "give the sweep of this one, or leave --scorecard out"
        )
    rows = []
    for row in rows_of(load_entries(sweep)):
        values = {"pretrained": row.pretrained, "scratch": row.scratch, "gain": row.gain}
        numbers = {k: round(v.mean, 6) for k, v in values.items() if v is not None}
        rows.append({"task": row.task, "method": row.method, "shots": row.shots, **numbers, "verdict": row.verdict})
    return rows


def _lineage(client: Any, commit: Commit) -> tuple[str | None, dict[str, str]]:
    """The MLflow run that saved this checkpoint, where this server knows it, and what it says of the code."""
    for experiment in client.search_experiments():
        wanted = f"tags.`checkpoint.digest` = '{commit.digest}'"
        for run in client.search_runs([experiment.experiment_id], wanted, max_results=1):
            names = ("code.revision", "code.dirty", "run_dir")
            found = {name: public(run.data.tags[name]) for name in names if run.data.tags.get(name)}
            return run.info.run_id, {"run_id": run.info.run_id, **found}
    return None, {}


def _description(commit: Commit, rows: list[dict[str, Any]]) -> str:
    """What a person reads on the version's page."""
    result = ", ".join(f"{name} {value:.4f}" for name, value in commit.evaluation.items())
    lines = [
        f"`{commit.config['model']['name']}` trained on {commit.dataset.get('name')} for {commit.samples:,} images "
        f"(step {commit.step}), {len(commit.classes)} classes." + (f" Evaluation: {result}." if result else ""),
        "",
        f"Checkpoint `{public(commit.url)}`, SHA-256 of its commit file `{commit.digest}`; the whole recipe stands in it.",
    ]
    if rows:
        lines += [
            "",
            "| task | method | images a class | pretrained | from scratch | gain |",
            "|---|---|--:|--:|--:|--:|",
        ]
        for row in rows:
            values = (f"{100 * row[k]:.1f} %" if k in row else "" for k in ("pretrained", "scratch", "gain"))
            lines.append(f"| {row['task']} | {row['method']} | {row['shots']} | {' | '.join(values)} |")
    while len("\n".join(lines)) > DESCRIPTION_CHARACTERS:
        lines.pop()
    return "\n".join(lines)


def _registered(client: Any, name: str, digest: str) -> Version | None:
    """The version under this name with this digest; a second registration, or one after a kill, makes no second version."""
    quoted = name.replace("'", "")
    for made in client.search_model_versions(f"name='{quoted}'"):
        if made.name == name and dict(made.tags).get(DIGEST) == digest:
            return Version(name=name, version=str(made.version), source=str(made.source), digest=digest)
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
