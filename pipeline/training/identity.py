"""Is it the same run: what a run folder records of data, classes, initial weights, code and versions, held against what is there.

    identity.json    of the last start: other data, classes or initial weights are refused with the first difference;
                     other code or versions, and the same data at another place, are reported and recorded

The configuration is compared in `pipeline.training.resume`, and each checkpoint against its own commit file as well.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import distributed, documents, provenance
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import TrainData
from pipeline.documents import Count, Text
from pipeline.errors import UserError
from pipeline.storage import objects
from pipeline.training.run import Run, flat

NAME = "identity.json"
HOSTS_OWN = (
    "data.url",
    "data.cache_dir",
    "data.cache_gb",
    "data.num_workers",
    "data.read_threads",
    "data.read_ahead_mb",
    "watchdog.",
    "saving.",
    "join.",
)
"""Fields in which the ranks of a run may differ: places and speeds of their hosts."""
MAX_FACT = 200
"""Characters of a fact; a longer one is held apart by its digest."""


@dataclass(frozen=True, kw_only=True)
class SourceIdentity:
    """One split that a run trains on."""

    url: Text
    split: Text
    digest: Text
    """Of the dataset that it belongs to."""
    num_samples: Count
    num_shards: Count
    shards: Text
    """SHA-256 over those of its shards, in order."""
    former_digest: Text = ""
    """Of the dataset before it was converted to this format."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The content of `identity.json`."""

    sources: list[SourceIdentity]
    names: list[Text]
    """Of the sources, in accounts."""
    classes: list[Text]
    initial_weights: Text = ""
    """What the network started from; "" until that is known."""
    code: Text = ""
    libraries: Text = ""
    micro_batches: dict[str, Count] = dataclasses.field(default_factory=dict)
    """What `micro_batch: auto` has found, by the number of processes."""

    @property
    def data_digest(self) -> str:
        return "+".join(dict.fromkeys(source.digest for source in self.sources))

    @property
    def former_data_digest(self) -> str:
        """What runs recorded before a dataset was converted."""
        return "+".join(dict.fromkeys(source.former_digest or source.digest for source in self.sources))


def of_run(data: TrainData) -> Identity:
    """What this start is made of."""
    sources = [
        SourceIdentity(
            url=manifest.url,
            split=index.name,
            digest=manifest.digest,
            num_samples=index.num_samples,
            num_shards=len(index.shards),
            shards=hashlib.sha256("".join(piece.shards_sha256 for piece in index.pieces).encode()).hexdigest(),
            former_digest=manifest.former_digest,
        )
        for manifest, index in zip(data.manifests, data.indices, strict=True)
    ]
    return Identity(
        sources=sources,
        names=list(data.names),
        classes=list(data.classes),
        code=provenance.code_revision(),
        libraries=f"Python {platform.python_version()}, {provenance.libraries()}",
    )


def read(out: str) -> Identity | None:
    """None where nothing is recorded yet, or an earlier version did not."""
    try:
        return documents.read(objects.join(out, NAME), Identity, remedy="restore it, or delete it if you know the data")
    except FileNotFoundError:
        return None


def write(out: str, identity: Identity) -> None:
    content = json.dumps(dataclasses.asdict(identity), indent=1) + "\n"
    objects.write_bytes(objects.join(out, NAME), content.encode())


def refuse_other_data(
    out: str, now: Identity, *, digest: str, classes: Sequence[str], before: Identity | None = None
) -> None:
    """UserError, with both digests and the first difference, unless the data are the same bytes under the same labels.

    Args:
        digest, classes: of the data that the run in `out` was trained on; `before`: all that its folder records of them.
    """
    if digest in (now.data_digest, now.former_data_digest) and list(classes) == now.classes:
        return
    places = ", ".join(dict.fromkeys(source.url for source in now.sources))
    difference = _classes_differ(classes, now.classes) or _sources_differ(before.sources if before else [], now.sources)
    raise UserError(
        f"{out} holds a run on data with digest {digest[:12]}, and {places} has {now.data_digest[:12]}: {difference}; "
        "give the same data, or another folder with --out"
    )


def _classes_differ(before: Sequence[str], now: Sequence[str]) -> str:
    """The first difference in words, or nothing."""
    if len(before) != len(now):
        return f"it had {len(before)} classes, there are {len(now)}"
    for number, (was, is_) in enumerate(zip(before, now, strict=True)):
        if was != is_:
            return f"class {number} was '{documents.excerpt(was)}' and is '{documents.excerpt(is_)}'"
    return ""


def _sources_differ(before: Sequence[SourceIdentity], now: Sequence[SourceIdentity]) -> str:
    same = "the classes are the same"
    if before and len(before) != len(now):
        return f"{same}, it had {len(before)} sources, there are {len(now)}"
    for was, is_ in zip(before, now, strict=False):
        if was.num_samples != is_.num_samples:
            return f"{same}, its {was.split} had {was.num_samples:,} samples, there are {is_.num_samples:,}"
        if was.num_shards != is_.num_shards:
            return f"{same}, its {was.split} had {was.num_shards} shards, there are {is_.num_shards}"
        if was.shards != is_.shards:
            return f"{same} and so are the numbers of samples and shards, but the shards hold other bytes"
    return (
        f"{same} and so are the shards; labels or another split are not" if before else f"{same}, other things are not"
    )


def keep_micro_batch(out: str, num_ranks: int, micro_batch: int) -> None:
    """For the next start on as many processes."""
    before = read(out)
    if before is not None:
        write(out, dataclasses.replace(before, micro_batches={**before.micro_batches, str(num_ranks): micro_batch}))


def claim_start(out: str, initial_weights: str) -> None:
    """Record what a run without a checkpoint starts from. UserError where its records are of a start from other weights."""
    before = read(out)
    if before is None or before.initial_weights == initial_weights:
        return
    if not before.initial_weights:
        write(out, dataclasses.replace(before, initial_weights=initial_weights))
    else:
        raise UserError(
            f"{out} holds a run that started from {before.initial_weights}, and now it would from {initial_weights}; "
            "give the same, or another folder with --out"
        )


def facts(run: Run, local_rank: int) -> dict[str, str]:
    """What is to be the same on all ranks (`pipeline.join`), by name."""
    found = {"code": provenance.code_digest()[:16], "revision": provenance.code_revision()}
    found |= {f"library {name}": version for name, version in provenance.deciding_versions().items()}
    found["devices"] = distributed.devices(local_rank)
    found["data"] = "+".join(dict.fromkeys(Manifest.open(url).digest[:16] for url, _ in run.data.sources()))
    fields = {name: value for name, value in flat(run).items() if not name.startswith(HOSTS_OWN)}
    return found | {f"field {name}": _fact(value) for name, value in fields.items()}


def _fact(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) <= MAX_FACT:
        return text
    return f"{text[: MAX_FACT - 30]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def changes(before: Identity, now: Identity) -> dict[str, str]:
    """What may change between two starts and did, in words."""
    found = {}
    if before.code and before.code != now.code:
        found["code"] = f"the code is {now.code}, and was {before.code} when the run was last started"
    if before.libraries and before.libraries != now.libraries:
        were, are = before.libraries.split(", "), now.libraries.split(", ")
        found["libraries"] = (
            f"the run goes on with {', '.join(w for w in are if w not in were) or 'fewer libraries'}; it was last started "
            f"with {', '.join(w for w in were if w not in are) or 'fewer'}"
        )
    was_at, is_at = ([source.url for source in each.sources] for each in (before, now))
    if was_at != is_at:
        found["data"] = f"the same data are read from {', '.join(is_at)}, before from {', '.join(was_at)}"
    return found
