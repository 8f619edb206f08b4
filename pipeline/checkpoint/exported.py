"""An exported folder: its description, `export.json`, written last, and how it is read as a checkpoint again.

    DIR/export.json          model, classes, preprocessing, source, check, and every other file with size and SHA-256
        model.safetensors    (or whatever the kind of export holds)
        README.md            the model card

A folder without `export.json` is no export; one with it is whole. Only the kind `safetensors` can be read back.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline import documents
from pipeline.checkpoint.commit import BufferType, Commit, FileInfo, check_format, refuse_pickle
from pipeline.documents import Count, Dimensions, Sha256, Text
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
    files: list[FileInfo]
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


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Fields of the checkpoint's `Commit`."""

    step: Count
    samples: Count
    num_updates: Count
    config_digest: Text
    dataset: dict[str, Any]
    evaluation: dict[Text, float]


@dataclass(frozen=True, kw_only=True)
class Description:
    """The fields of `export.json` that are read back, and its digest."""

    digest: Sha256
    kind: Literal["safetensors", "timm", "onnx", "mlflow"]
    weights: Literal["ema", "raw"]
    classes: list[Text]
    files: list[FileInfo]
    source: _Source
    run: dict[str, Any]
    license: Text = ""
    """As Hugging Face spells it; "" where none was given."""
    shapes: dict[Text, Dimensions] = field(default_factory=dict)
    buffers: dict[Text, BufferType] = field(default_factory=dict)


def listed(url: str | os.PathLike[str]) -> Description:
    """What `export.json` says. UserError if it is absent, damaged, of another format, or names a pickle."""
    found = _read(os.fspath(url))
    for file in found.files:
        refuse_pickle(file["name"])
    return found


def verify(folder: Path) -> Description:
    """`listed`, of a local folder whose every file has the size and the SHA-256 that stand there, or UserError."""
    found = listed(folder)
    for file in found.files:
        path = folder / file["name"]
        if (
            not path.is_file()
            or path.stat().st_size != file["size_bytes"]
            or objects.sha256_file(path) != file["sha256"]
        ):
            raise UserError(f"{path} is not what {NAME} says of it; fetch or export it again")
    return found


def _read(url: str) -> Description:
    place, remedy = objects.join(url, NAME), "export again"
    try:
        data = objects.read_bytes(place, max_bytes=documents.MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{url} is no exported folder: it has no {NAME}; see 'normfree export --help'") from None
    body = documents.parse_json(data, place, remedy=remedy)
    check_format(body, FORMAT, place, remedy=remedy)
    digest = hashlib.sha256(data).hexdigest()
    return documents.convert({**body, "digest": digest}, Description, place, remedy=remedy)


def as_commit(url: str) -> Commit:
    """The folder as a checkpoint that holds one kind of weights, so that all that reads checkpoints reads it too.

    Its digest is that of `export.json`, not of the source: raw and averaged weights of one checkpoint are different things.

    Raises:
        UserError: `export.json` is absent, damaged or of another format, or the weights are of a kind that is not read back.
    """
    found = _read(url)
    if found.kind != "safetensors":
        raise UserError(
            f"{url} is an export to {found.kind}, which is not read back; give the checkpoint, or one made with "
            "--format safetensors"
        )
    return Commit(
        url=url,
        digest=found.digest,
        shapes=found.shapes,
        kinds=[{"ema": "ema", "raw": "weights"}[found.weights]],
        files=[f for f in found.files if f["name"] == WEIGHTS],
        config=found.run,
        classes=found.classes,
        buffers=found.buffers,
        **vars(found.source),
    )
