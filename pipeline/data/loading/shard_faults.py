"""Shards that are missing or cut before the first sample is read."""

from collections.abc import Sequence

from pipeline.data.loading.shard_reader import ShardFault, ShardReader
from pipeline.distributed import World, from_main
from pipeline.errors import UserError
from pipeline.storage import objects
from pipeline.storage.range_reads import ObjectVersion


def look_at_shards(readers: Sequence[ShardReader], world: World | None) -> list[ShardFault]:
    """Of a store once a run, by the main rank: a listing for each rank is more than a store likes. A file's version is its
    inode's, which may be another on each host."""

    def look() -> dict[int, dict[str, ObjectVersion | None]]:
        return {i: reader.find_versions() for i, reader in enumerate(readers) if not objects.is_local(reader.url)}

    found = look() if world is None else from_main(world, look)
    for number, reader in enumerate(readers):
        reader.versions = found[number] if number in found else reader.find_versions()
    return [fault for reader in readers for fault in reader.faults()]


def refuse_faults(faults: list[ShardFault], allowed: int) -> None:
    """A missing or cut shard that would cost more than the budget stops the run before step 0."""
    lost = sum(fault.num_samples for fault in faults)
    if lost > allowed:
        worst = max(faults, key=lambda fault: fault.num_samples)
        more = f" (and {len(faults) - 1} more shards are not as they should be)" if len(faults) > 1 else ""
        raise UserError(
            f"shard {worst.reason}{more}: {lost} samples are lost with that, and {allowed} an epoch are allowed; "
            "restore it, prepare the dataset again, or raise data.max_lost_share"
        )
