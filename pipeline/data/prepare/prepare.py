"""Raw images -> a prepared dataset: list, plan, write shards and indices, and the manifest last.

    open_source (listing) -> plan_shards (what goes where) -> ShardWriter in worker processes -> journal -> manifest

The shards are the same, byte by byte, whether the source was a tar or a folder, for any number of workers and after any
number of interruptions: the plan depends on the listing and the seed alone. Until the manifest is there `PREPARING.json`
marks the output as unfinished; the same command goes on where it was. An output that holds anything else is never touched.

In memory are the listing and the plan (some 0.5 KB an image) and one image a worker. A compressed tar or parquet is copied
once to the staging folder, as large as it is unpacked; other sources cost no disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.data import parts
from pipeline.data.format.label_sets import without_image
from pipeline.data.format.manifest import Manifest
from pipeline.data.format.shards import SHARD_BYTES
from pipeline.data.parts import Part
from pipeline.data.prepare import journal, plan_files
from pipeline.data.prepare import plan as plans
from pipeline.data.prepare.assemble import MadePiece, PieceMaker, assemble, plan_pieces
from pipeline.data.prepare.output_folder import (
    Staging,
    claim,
    existing_dataset,
    explain_full_disk,
    only_writer,
    publish_manifest,
    release,
    remove_written,
    staging,
)
from pipeline.data.prepare.plan import Access, Plan
from pipeline.data.prepare.reencode import Reencode
from pipeline.data.prepare.shard_plan import PlannedShard
from pipeline.data.prepare.shard_writer import ShardWriter
from pipeline.data.process_pool import Each, each
from pipeline.data.sources.cards import Card
from pipeline.data.sources.entry import ImageSource
from pipeline.data.sources.open_source import open_source
from pipeline.errors import UserError
from pipeline.storage import objects

Progress = Callable[[str, int, int], None]
"""progress(phase, done, total): "copying" in files of the source, then "writing" in images."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The dataset of `card` in the folder or prefix `out`, written by one process, or by parts on many machines."""

    card: Card
    out: str
    source: str | None = None
    """Path or URL of the raw images; not needed for embedded and torchvision sets."""
    splits: Sequence[str] | None = None
    """Only these; None: all that the source has."""
    shard_bytes: int = SHARD_BYTES
    """Size at which a tar is closed."""
    shard_samples: int | None = None
    """Images of a tar; given, it takes the place of `shard_bytes`."""
    max_bad_share: float = 0.001
    """Of images, over all splits, that may be unreadable; they are listed."""
    seed: int = 0
    """Of the order in which samples are written."""
    val_share: float | None = None
    """Of each class, held out as val where the source has no split folders."""
    allow_roots: Sequence[str] = ()
    """Folders and addresses that a list may name besides what lies below its own folder."""
    reencode: Reencode = field(default_factory=Reencode)
    """How images are made smaller; as it is: their bytes stay."""
    workers: int = 1
    """Processes; the result is the same for any number."""
    run_each: Each | None = None  # in place of processes of this machine
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.source is not None and objects.is_local(self.source):  # parts may run in other folders
            object.__setattr__(self, "source", str(objects.local_path(self.source).absolute()))

    def run(self, *, merge: bool = False) -> Manifest:
        """Write the dataset, or return it at once if it is there already.

        Args:
            merge: its shards were written by parts (`run_part`), all of which must be done.
        Raises:
            UserError: bad arguments, a bad source (`open_source`), too many images that cannot be read, a full disk, an `out`
                that holds something else, or a part that is missing. No manifest is left behind then; finished shards are, for
                the next run.
        """
        recipe, existing = self._existing()
        if existing is not None and self._source_is_gone:
            return existing
        with explain_full_disk(self.out), only_writer(self.out, existing), staging(self.out) as folders:
            if existing is not None:
                if existing.recipe.get("source_fingerprint") != self._open(folders).fingerprint:
                    raise UserError(
                        f"{existing.url} holds '{existing.name}' from another source than {self.source}: "
                        "remove it or choose another --out"
                    )
                return existing
            plan = (self._left_plan(folders, recipe) if merge else None) or self._make_plan(folders, recipe)
            if merge:
                parts.results(journal.parts_folder(self.out), plan.work)
            recipe["source_fingerprint"] = plan.source.fingerprint
            claim(self.out, self.card, recipe)
            shards = plans.whole(plan, writer := self._writer(folders, plan.source), self._plan_folder)
            self._write(writer, [shard for shard, _ in shards], plan)
            pieces = plan_pieces((shard.split, shard.name, digest) for shard, digest in shards)
            made = list(self._each(PieceMaker(self.out, folders.work, len(plan.source.classes)), pieces))
            self._finish(plan, made, recipe, folders)
        release(self.out)
        return Manifest.open(self.out)

    def run_part(self, part: Part) -> int:
        """Write a share of the shards; how many. Errors as of `run`, and for an `out` that holds parts of another preparation."""
        recipe, existing = self._existing()
        if existing is not None:
            return 0
        folder = journal.parts_folder(self.out)
        with (
            explain_full_disk(self.out),
            parts.hold(folder, part),
            staging(self.out, f"spool-{part.number}-of-{part.of}") as folders,
        ):
            plan = self._shared_plan(folders, recipe)
            claim(self.out, self.card, {**recipe, "source_fingerprint": plan.source.fingerprint}, is_shared=True)
            mine = plan.read(*part.span(plan.num_shards))
            self._write(self._writer(folders, plan.source), mine, plan)
            parts.record(folder, part, plan.work, {"shards": len(mine)})
        return len(mine)

    def _shared_plan(self, folders: Staging, recipe: Mapping[str, Any]) -> Plan:
        """The plan that a part has left, or ours, which is left for the others."""

        def ours() -> Plan:
            made = self._make_plan(folders, recipe)
            claim(self.out, self.card, {**recipe, "source_fingerprint": made.source.fingerprint}, is_shared=True)
            return made

        if (found := self._left_plan(folders, recipe)) is not None:
            return found
        if (access := self._access(folders)) is None:
            return ours()
        # Each part needs a copy of its own: none waits for another's before it begins. To know whether a folder in a store is
        # copied is to list it.
        if (objects.is_local(access.source) or objects.is_file(access.source)) and (copy := access.copy) is not None:
            copy()
        wait = partial(self.progress, "another part lists the source", 0, 1) if self.progress else None
        return plan_files.shared(self._plan_folder, access.asked(recipe), access, ours, wait)

    def _left_plan(self, folders: Staging, recipe: Mapping[str, Any]) -> Plan | None:
        access = self._access(folders)
        return None if access is None else plan_files.read(self._plan_folder, access.asked(recipe), access)

    def _access(self, folders: Staging) -> Access | None:
        """None of a set that a package holds: whoever reads its images opens all of it."""
        if self.source is None or self.card.kind in ("embedded", "torchvision"):
            return None
        copying = partial(self.progress, "copying") if self.progress else None
        return Access(self.card, self.source, tuple(self.allow_roots), folders.spool, copying)

    @property
    def _plan_folder(self) -> str:
        return objects.join(self.out, journal.FOLDER, "plan")

    def _make_plan(self, folders: Staging, recipe: Mapping[str, Any]) -> Plan:
        opened = self._open(folders)
        entries = plans.wanted(opened, self.splits, self.source or self.card.name)
        return plans.make(opened, entries, self._writer(folders, opened), recipe)

    def _writer(self, folders: Staging, raw: ImageSource) -> ShardWriter:
        return ShardWriter(raw.reader, self.out, folders.work, self.reencode, len(raw.masks), self.card.mask_of_first)

    def _write(self, writer: ShardWriter, shards: Sequence[PlannedShard], plan: Plan) -> None:
        """Shards that an earlier run has written stay as they are."""
        # A copy as large as the source is made where some image will be read: a merge has none to read.
        if plan.copy is not None and self.source is not None and not all(map(writer.is_done, shards)):
            shards = plans.in_copy(shards, self.source, plan.copy())
        num_done, num_bad, to_do = 0, 0, sum(len(shard.entries) for shard in shards)
        total = sum(plan.images.values())  # of the dataset
        report = self.progress or (lambda *_: None)
        report("writing", 0, to_do)
        for finished in self._each(writer, shards):
            num_done += finished.num_planned
            num_bad += len(finished.skipped)
            report("writing", num_done, to_do)
            if num_bad > self.max_bad_share * total:
                last = finished.skipped[-1]
                raise UserError(
                    f"{num_bad} of the first {num_done} images (of {total}) cannot be read or decoded, above the share of "
                    f"{self.max_bad_share:g} that is allowed; the last is {last.split}/{last.key} ({last.reason}): mend the "
                    "source, or raise --max-bad-share and run again, which keeps what is written"
                )

    def _finish(self, plan: Plan, made: Sequence[MadePiece], recipe: dict[str, Any], folders: Staging) -> None:
        """What is not needed goes, and the manifest comes: with it the dataset exists."""
        card, opened = self.card, plan.source
        counts = [part.class_counts for part in made if part.split == "train"]
        if not (card.indexed or card.tests_only) and (bare := without_image(opened.classes, opened.labels, counts)):
            raise UserError(
                f"the class {bare[0]} has no image in train that can be read: mend its images, or remove it"
            )
        folders.work.mkdir(parents=True, exist_ok=True)
        note = "; ".join(filter(None, [opened.note, plans.count_note(card, plan.images)]))
        result = assemble(card.name, self.out, opened.classes, made, recipe, note, folders.work, **opened.several)
        names = {name for part in made for name in (*part.names, *part.shards)}
        if result.skipped_list is not None:
            names.add(result.skipped_list.name)
        remove_written(self.out, keep=names)  # what an interrupted run with other options left
        publish_manifest(result, folders.work)

    @property
    def _each(self) -> Each:
        return self.run_each or partial(each, num_workers=self.workers)

    def _existing(self) -> tuple[dict[str, Any], Manifest | None]:
        self._check()
        return (recipe := self._recipe()), existing_dataset(self.out, self.card, recipe)

    def _check(self) -> None:
        if self.shard_bytes < 1 << 12:
            raise UserError(
                f"shard_bytes {self.shard_bytes} is too small: give at least 4096, or leave it at {SHARD_BYTES}"
            )
        if self.shard_samples is not None and self.shard_samples < 1:
            raise UserError(f"shard_samples {self.shard_samples} must be at least 1, for example 1000")
        if not 0 <= self.max_bad_share < 1:
            raise UserError(f"max_bad_share {self.max_bad_share} must be at least 0 and below 1, for example 0.001")
        if self.splits is not None and "train" not in self.splits:
            raise UserError(
                f"splits {', '.join(self.splits) or '(none)'} must include train: the classes are defined by it"
            )

    def _recipe(self) -> dict[str, Any]:
        """What the bytes of the dataset follow from, besides the source; kept in the manifest."""
        return {
            "card": self.card.name,
            **({"multi_label": self.card.multi_label} if self.card.multi_label else {}),
            "splits": sorted(self.splits) if self.splits else None,
            "shard_bytes": self.shard_bytes if self.shard_samples is None else None,
            "shard_samples": self.shard_samples,
            "seed": self.seed,
            "val_share": self.val_share,
            "reencode": self.reencode.to_recipe(),
        }

    @property
    def _source_is_gone(self) -> bool:
        """A finished dataset does not need its source (or a download) any more; a tar or folder still there must match."""
        gone = self.source is None or self.card.kind == "torchvision" or not objects.exists(self.source)
        return gone and self.card.kind != "embedded"

    def _open(self, folders: Staging) -> ImageSource:
        return open_source(
            self.card,
            self.source,
            val_share=self.val_share,
            splits=self.splits,
            allow_roots=self.allow_roots,
            spool=folders.spool,
            progress=partial(self.progress, "copying") if self.progress else None,
        )


def prepare(card: Card, out: str, **options: Any) -> Manifest:
    """`Preparation` in one go; `options` are its fields."""
    return Preparation(card=card, out=out, **options).run()
