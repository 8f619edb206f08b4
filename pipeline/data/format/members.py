"""What lies beside the images in their shards, and is read whole: masks, boxes."""

import hashlib
import io
from collections.abc import Iterator

from pipeline.data.format.index import SplitIndex
from pipeline.data.format.tars import BadTar, read_member, walk
from pipeline.errors import UserError
from pipeline.storage import objects


def members_of(index: SplitIndex, wanted: str) -> Iterator[tuple[str, bytes]]:
    """(where it is, bytes) of the member `<key>.<wanted>` of each image of a split, in the order of its index; shards are read
    whole, and held against their digests.

    Raises:
        UserError: a shard is gone or has changed, or an image of it has no such member.
    """
    for number, shard in enumerate(index.shards):
        url = objects.join(index.url, shard.name)
        try:
            data = objects.read_bytes(url, max_bytes=shard.size_bytes + 1)
        except FileNotFoundError:
            raise UserError(f"{url} is missing; restore it, or prepare the dataset again") from None
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise UserError(f"{url} has changed (SHA-256 differs); restore it, or prepare the dataset again")
        found: dict[str, bytes] = {}
        try:
            for member, tar, info in walk(io.BytesIO(data)):
                key, _, ending = member.name.partition(".")
                if ending == wanted:
                    found[key] = read_member(tar, info)
        except BadTar as error:
            raise UserError(f"{url} is {error}; restore it, or prepare the dataset again") from None
        for sample in index.samples_of(number):
            key = str(index.keys[sample])
            if key not in found:
                raise UserError(f"{url}: {key} has no member {wanted}; prepare the dataset again")
            yield f"{url}, {key}", found[key]
