"""A dataset whose first training shard is stated otherwise, with all digests above it as a forger would write them."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.data.format import manifest as manifests
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.pieces import Piece, StoredFile


def forge(dataset: Path, **changes: Any) -> None:
    manifest = Manifest.open(str(dataset))
    split, table = manifest.splits["train"], manifest.split("train").table(0)
    table = replace(table, shards=(replace(table.shards[0], **changes), *table.shards[1:]))
    path = dataset / split.pieces[0].table.name
    path.write_text(json.dumps(asdict(table)))
    stored = StoredFile(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    pieces = (Piece(**asdict(table.summary()), table=stored), *split.pieces[1:])
    splits = {**manifest.splits, "train": replace(split, pieces=pieces)}
    digest = manifests.dataset_digest(manifest.classes, splits)
    (dataset / manifests.NAME).write_bytes(replace(manifest, splits=splits, digest=digest).to_json())
