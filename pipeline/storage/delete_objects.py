"""All objects under a folder of an S3 store go, or the number that stays is reported.

DeleteObjects takes a thousand keys at a time and answers 200 even where it kept some; s3fs reads only the keys that went. Some
stores refuse it altogether (they want a Content-MD5 with it, which clients send no more). What it does not say to have
deleted is deleted key by key.
"""

import functools
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import clients, store_errors

MAX_KEYS = 1000  # S3's limit of one request


def delete_tree(url: str) -> None:
    """Delete every object under the folder `url`; nothing happens if there is none.

    Raises:
        UserError: the store keeps some of them; says how many, and its reason for the first. The others are gone.
        OSError: the store did not answer, again and again.
    """
    paths = clients.with_retries(url, _find)
    kept: list[UserError] = []
    for start in range(0, len(paths), MAX_KEYS):
        batch = paths[start : start + MAX_KEYS]
        gone = clients.with_retries(url, functools.partial(_delete_many, batch))
        for path in batch:
            if path not in gone:
                try:
                    clients.with_retries(f"s3://{path}", lambda fs, path: fs.rm_file(path))
                except FileNotFoundError:
                    pass
                except UserError as error:
                    kept.append(error)
    if kept:
        raise UserError(f"{len(kept)} of {len(paths)} objects under {url} could not be deleted: {kept[0]}") from kept[0]


def _find(fs: Any, path: str) -> list[str]:
    fs.invalidate_cache()
    folder = path.rstrip("/") + "/"
    return [found for found in fs.find(path) if found.startswith(folder)]


def _delete_many(paths: list[str], fs: Any, _: str) -> set[str]:
    """Those of the paths (bucket/key) that the store says are gone."""
    bucket = fs.split_path(paths[0])[0]
    keys = [{"Key": fs.split_path(path)[1]} for path in paths]
    try:
        answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": False})
    except OSError as error:
        if store_errors.answer_of(error).status in (400, 403, 405, 411, 501):
            return set()
        raise
    return {f"{bucket}/{each.get('Key')}" for each in answer.get("Deleted", [])}
