"""One object in parts, several on their way at a time: a reader sees what was there before, or the whole new object.

S3 shows nothing of an upload in parts until it is completed, so the bytes may come straight from memory, and a broken
upload leaves no object. s3fs would read up to 500 MB ahead and wait for each group of parts; here `NUM_AT_ONCE` parts are in
memory, and the next starts when one is done. Asks of a client only what `pipeline.storage.clients` gives it.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import Any

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
"""S3's limit; larger objects get larger parts."""
NUM_AT_ONCE = 4
TOKEN = "normfree-upload"
LATE_S = (0.0, 0.2, 0.5, 1.0, 2.0)
"""Waits before each look for an object that may be there."""

Read = Callable[[int, int], bytes]
"""(offset, length) -> the bytes there; called on threads of their own."""


def takes_parts(fs: Any) -> bool:
    """Whether the file system is S3, which this module writes to."""
    return "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def put(fs: Any, path: str, size_bytes: int, read: Read, check_cancelled: Callable[[], None] = lambda: None) -> None:
    """Write the object `path` of `size_bytes`. `check_cancelled` is called before each part and may raise to give up.

    The client tries each request again; what still fails is raised when the upload was taken back, so that the store keeps no
    parts of it.
    """
    running = asyncio.run_coroutine_threadsafe(_put(fs, path, size_bytes, read, check_cancelled), fs.loop)
    try:
        running.result()
    except BaseException:
        running.cancel()  # nothing happens where it has ended by itself
        raise


async def _put(fs: Any, path: str, size_bytes: int, read: Read, check_cancelled: Callable[[], None]) -> None:
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    check_cancelled()
    if size_bytes <= PART_BYTES:
        await fs._call_s3("put_object", Body=await asyncio.to_thread(read, 0, size_bytes), **place)
        return
    token = secrets.token_hex(8)
    upload = await fs._call_s3("create_multipart_upload", Metadata={TOKEN: token}, **place)
    place["UploadId"] = upload["UploadId"]
    try:
        parts = await _send(fs, place, size_bytes, read, check_cancelled)
        check_cancelled()
        await _complete(fs, place, parts, token)
    except BaseException:
        with contextlib.suppress(Exception):
            await fs._call_s3("abort_multipart_upload", **place)
        raise


async def _send(
    fs: Any, place: dict[str, str], size_bytes: int, read: Read, check_cancelled: Callable[[], None]
) -> list[dict[str, Any]]:
    length = max(PART_BYTES, -(-size_bytes // MAX_PARTS))
    waiting = iter(range(-(-size_bytes // length)))
    parts: list[dict[str, Any]] = []

    async def work() -> None:
        for number in waiting:
            check_cancelled()
            start = number * length
            data = await asyncio.to_thread(read, start, min(length, size_bytes - start))
            answer = await fs._call_s3("upload_part", PartNumber=number + 1, Body=data, **place)
            parts.append({"PartNumber": number + 1, "ETag": answer["ETag"]})

    tasks = [asyncio.ensure_future(work()) for _ in range(NUM_AT_ONCE)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # an upload is not taken back under a part on its way
    return sorted(parts, key=lambda part: int(part["PartNumber"]))


async def _complete(fs: Any, place: dict[str, str], parts: list[dict[str, Any]], token: str) -> None:
    try:
        await fs._call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **place)
    except Exception as error:
        # The store may have done it and its answer got lost; a second try then meets an upload that is no more. The object
        # that carries our token is ours; the store may show it late.
        for wait_s in LATE_S:
            await asyncio.sleep(wait_s)
            with contextlib.suppress(FileNotFoundError):
                found = await fs._call_s3("head_object", Bucket=place["Bucket"], Key=place["Key"])
                if {name.lower(): value for name, value in found.get("Metadata", {}).items()}.get(TOKEN) == token:
                    return
            if not isinstance(error, FileNotFoundError):
                raise
        raise OSError(f"the store lost an upload of {'/'.join((place['Bucket'], place['Key']))} in parts") from None
