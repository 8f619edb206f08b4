"""An exported folder: its description, `export.json`, written last, and how it is read as a checkpoint again.

    DIR/export.json          model, classes, preprocessing, source, check, and every other file with size and SHA-256
        model.safetensors    (or whatever the kind of export holds)
        README.md            the model card

A folder without `export.json` is no export; one with it is whole. Only the kind `safetensors` can be read back.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.commit import Commit
from pipeline.errors import UserError
from pipeline.storage import objects

NAME = "export.json"
WEIGHTS = "model.safetensors"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `pipeline.export.export` made."""

    url: str
    kind: str
    """safetensors, timm, onnx or mlflow."""
    weights: str
    """ema or raw."""
    digest: str
    """SHA-256 of `export.json`."""
    source_url: str
    source_digest: str
    """SHA-256 of the commit file of the checkpoint."""
    classes: list[str]
    files: list[dict[str, Any]]
    """name, size_bytes and sha256 of each file but `export.json`."""
    difference: float
    """Largest difference of logits to the checkpoint's on the fixed batch, as a share of the largest logit."""
    tolerance: float

    @property
    def size_bytes(self) -> int:
        return sum(f["size_bytes"] for f in self.files)


def write(folder_url: str, description: dict[str, Any]) -> str:
    """Make the export exist; its digest."""
    data = json.dumps({"format": FORMAT, **description}, indent=1).encode()
    objects.write_bytes(objects.join(folder_url, NAME), data)
    return hashlib.sha256(data).hexdigest()


def is_exported(url: str) -> bool:
    return objects.exists(objects.join(url, NAME))


def read(url: str) -> tuple[dict[str, Any], str]:
    """(description, digest of `export.json`). Raises UserError if it is absent, damaged or of another format."""
    place = objects.join(url, NAME)
    try:
        data = objects.read_bytes(place)
        body = json.loads(data)
        if body["format"] != FORMAT:
            raise UserError(f"{place} has format {body['format']}, this version reads {FORMAT}; export again")
        for field in ("kind", "model", "classes", "preprocessing", "weights", "source", "run", "files"):
            body[field]
    except FileNotFoundError:
        raise UserError(f"{url} is no exported folder: it has no {NAME}; see 'normfree export --help'") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place} is damaged ({type(error).__name__}: {error}); export again") from None
    return body, hashlib.sha256(data).hexdigest()


def as_commit(url: str) -> Commit:
    """The folder as a checkpoint that holds one kind of weights, so that all that reads checkpoints reads it too.

    Its digest is that of `export.json`, not of the source: raw and averaged weights of one checkpoint are different things.
    """
    body, digest = read(url)
    if body["kind"] != "safetensors":
        raise UserError(
            f"{url} is an export to {body['kind']}, which is not read back; give the checkpoint, or one made with "
            "--format safetensors"
        )
    source = body["source"]
    return Commit(
        url=url,
        digest=digest,
        step=source["step"],
        samples=source["samples"],
        num_updates=source["num_updates"],
        shapes=body["shapes"],
        kinds=[{"ema": "ema", "raw": "weights"}[body["weights"]]],
        files=[f for f in body["files"] if f["name"] == WEIGHTS],
        config=body["run"],
        config_digest=source["config_digest"],
        dataset=source["dataset"],
        classes=body["classes"],
        evaluation=source["evaluation"],
    )
