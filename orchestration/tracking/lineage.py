"""Provenance of a checkpoint: links between the runs and models of a tracker, to be walked both ways.

    a sweep's runs   tags pretraining.run_id, pretraining.tracking_uri   -> the run that saved their checkpoint
    that run         tags sweep.<id>, registered.<name>                  -> the sweeps and models that were made of it
    a model version  its run, and tags sweep.<id>                        -> both

A run is found by the digests of the checkpoints that it saved, and where another server has it, by the account that the
run's own folder keeps of where its records went. Each link is a tag of its own: two sweeps that end together lose none.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.spool import mirror
from orchestration.tracking import heartbeat
from orchestration.tracking.translate import CHECKPOINT_DIGITS
from pipeline import documents
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage import objects

DIGEST = "normfree.digest"
"""Of a model version: of the commit file of its checkpoint."""
RUN_ID, TRACKING_URI, SWEEP, REGISTERED = "pretraining.run_id", "pretraining.tracking_uri", "sweep.", "registered."
LINK_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The run that saved a checkpoint."""

    run_id: str = ""
    """Empty: nobody knows of it."""
    tracking_uri: str = ""
    """Of another server that has the run; empty: this one."""

    @property
    def tags(self) -> dict[str, str]:
        found = {RUN_ID: self.run_id, TRACKING_URI: self.tracking_uri}
        return {key: value for key, value in found.items() if value}


def merged(origins: Sequence[Origin]) -> dict[str, str]:
    """Tags of a sweep of several checkpoints: their runs with spaces between."""
    each = [origin.tags for origin in origins]
    keys = {key: None for tags in each for key in tags}
    return {key: " ".join(dict.fromkeys(tags[key] for tags in each if key in tags)) for key in keys}


def run_of(client: Any, digest: str) -> Any:
    """The run on this server that saved the checkpoint of this digest, None if it has none such."""
    if not digest:
        return None
    experiments = heartbeat.all_experiments(client)
    # The newest digest stands whole; of runs of earlier versions it is the only one.
    for wanted in (f"digests` LIKE '%{digest[:CHECKPOINT_DIGITS]}%'", f"digest` = '{digest}'"):
        for run in client.search_runs(experiments, f"tags.`checkpoint.{wanted}", max_results=1):
            return run
    return None


def origin(client: Any, digest: str, url: str) -> Origin:
    """Of a checkpoint by its digest, else by what the run folder around its URL says of where the records are."""
    run = run_of(client, digest)
    if run is not None:
        return Origin(run_id=run.info.run_id)
    folder = url.partition("/checkpoints/")[0]
    if folder == url:
        return Origin()
    place = [mirror.STATE] if objects.is_local(folder) else [mirror.FOLDER, mirror.STATE]
    with contextlib.suppress(OSError, ValueError, UserError):
        for server, state in documents.read(objects.join(folder, *place), dict[str, dict[str, Any]]).items():
            if re.fullmatch("[0-9a-f]{32}", str(state.get("run_id"))):  # as MLflow makes them
                is_inside = mirror.OURS in server  # SQLite in the run folder, which 'normfree ui FOLDER' shows
                return Origin(run_id=state["run_id"], tracking_uri=public(folder if is_inside else server))
    return Origin()


def link_back(client: Any, origin: Origin, digest: str, sweep_run_id: str, sweep: str) -> None:
    """From the run that saved a checkpoint, and from its model versions, to a sweep of it, where this server has them."""
    key = f"{SWEEP}{sweep_run_id[:LINK_DIGITS]}"
    text = f"{public(sweep)}, run {sweep_run_id}, checkpoint {digest[:CHECKPOINT_DIGITS]}"
    if origin.run_id and not origin.tracking_uri:
        client.set_tag(origin.run_id, key, text)
    for version in client.search_model_versions(f"tags.`{DIGEST}` = '{digest}'") if digest else ():
        client.set_model_version_tag(version.name, version.version, key, text)


def link_version(client: Any, run_id: str, name: str, version: str, digest: str) -> None:
    """From a run to a version of a model that it saved."""
    text = f"models:/{name}/{version}, checkpoint {digest[:CHECKPOINT_DIGITS]}"
    client.set_tag(run_id, _version_tag(name, version), text)


def unlink_version(client: Any, run_id: str, name: str, version: str) -> None:
    """Take that link back. The run may be gone, or have none: its registering was killed in between."""
    try:
        client.delete_tag(run_id, _version_tag(name, version))
    except Exception as error:
        if getattr(error, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise


def _version_tag(name: str, version: str) -> str:
    cleaned = re.sub(r"[^\w. -]", "_", name)  # the letters that MLflow takes
    return f"{REGISTERED}{cleaned}.{version}"


def sweeps_of(run: Any, digest: str) -> dict[str, str]:
    """Of a run's tags those of sweeps of this checkpoint."""
    mark = f"checkpoint {digest[:CHECKPOINT_DIGITS]}"
    return {key: text for key, text in run.data.tags.items() if key.startswith(SWEEP) and mark in text}
