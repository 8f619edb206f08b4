"""Exported folders on the Hugging Face Hub, or a server that speaks like it (HF_ENDPOINT): `hf://ORG/NAME[@REVISION]`.

A push is one commit, so that a repository holds all files of an export or none. A pull fetches what `export.json` names, of
one commit, and its folder appears when every file has the size and the SHA-256 that stand there. The token comes from
HF_TOKEN alone, and stands in no message.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import documents, places
from pipeline.checkpoint import exported
from pipeline.checkpoint.pull import target_of
from pipeline.errors import UserError
from pipeline.secrets import Hidden

SCHEME = "hf://"
_PLACE = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_REFUSED = {401: "set HF_TOKEN to a token that may", 403: "the token in HF_TOKEN may not"}


@dataclass(frozen=True)
class Place:
    repository: str
    """ORG/NAME."""
    revision: str | None
    """A branch, a tag or a commit."""


def is_place(url: str) -> bool:
    return url.startswith(SCHEME)


def parse(url: str) -> Place:
    """UserError for what names no repository of models."""
    match = _PLACE.fullmatch(url.rstrip("/"))
    if match is None:
        raise UserError(f"{url} names no repository; write hf://ORG/NAME, or hf://ORG/NAME@REVISION")
    return Place(match[1], match[2])


def push(folder: Path, url: str, *, private: bool = False) -> str:
    """Commit an exported folder, made a repository of if need be; the commit's URL.

    Raises:
        UserError: the folder is damaged, there is no token, the server cannot be reached or refuses.
    """
    place, found = parse(url), exported.verify(folder)
    if not os.environ.get("HF_TOKEN"):
        raise UserError(f"a push to {url} needs a token that may write there; set HF_TOKEN in the environment")
    with _asking(url) as hub:
        from huggingface_hub import CommitOperationAdd

        hub.create_repo(place.repository, private=private, exist_ok=True)
        names = [*(file["name"] for file in found.files), exported.NAME]
        made = hub.create_commit(
            place.repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names],
            commit_message=f"Export to {found.kind} with digest {found.digest[:12]}",
            revision=place.revision,
        )
    return str(made.commit_url)


def pull(url: str, to: str, *, connections: int = 8) -> exported.Description:
    """Fetch an exported folder into the new local folder `to`; what has arrived of a broken pull waits in `to`.partial.

    Raises:
        UserError: no such repository or revision, no exported folder in it, files of another size or content than it says,
            something else at `to`, another pull that works there, a server that cannot be reached.
    """
    place, target = parse(url), target_of(to)
    _refuse_taken(target)
    with _asking(url) as hub:
        commit = hub.model_info(place.repository, revision=place.revision).sha
        with _work_folder(target) as work:
            found = _fetch(hub, url, commit, work, connections)
            try:
                os.replace(work, target)
            except OSError as error:
                raise UserError(f"cannot make {target} ({error.strerror}); give another folder with --to") from None
    return found


def _fetch(hub: Any, url: str, commit: str, work: Path, connections: int) -> exported.Description:
    """The exported folder of one commit, and nothing beside it, in `work`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repository = parse(url).repository

    def fetch(name: str, size_bytes: int | None) -> None:
        asked = hf_hub_url(repository, name, revision=commit, endpoint=hub.endpoint)
        there = hub.get_hf_file_metadata(url=asked).size
        if there is not None and (there > documents.MAX_BYTES if size_bytes is None else there != size_bytes):
            raise UserError(
                f"{url} is damaged: its {name} has {there:,} bytes; nothing of that was fetched, ask who pushed it"
            )
        hub.hf_hub_download(repository, name, revision=commit, local_dir=work)

    try:
        fetch(exported.NAME, None)
    except RemoteEntryNotFoundError:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"{url} has no {exported.NAME}, so it was not pushed by normfree; give one that was") from None
    files = exported.listed(work).files
    try:
        with ThreadPoolExecutor(connections) as pool:
            for _ in pool.map(lambda file: fetch(file["name"], file["size_bytes"]), files):
                pass
    except RemoteEntryNotFoundError:
        raise UserError(f"{url} lacks a file that its {exported.NAME} names; ask who pushed it") from None
    try:
        found = exported.verify(work)
    except UserError:
        shutil.rmtree(work)
        raise
    keep = {exported.NAME, *(file["name"] for file in files)}
    for path in sorted(
        work.rglob("*"), reverse=True
    ):  # of the library, and of a pull of something else that broke off here
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()
        elif path.relative_to(work).as_posix() not in keep:
            path.unlink()
    return found


def _refuse_taken(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is not empty; give another folder with --to")


@contextlib.contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """`target`.partial, locked."""
    work = target.with_name(f"{target.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        folder = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot write to {work} ({error.strerror}); give another folder with --to") from None
    try:
        if places.lock(folder, wait=False) is False:
            raise UserError(f"another pull works on {work}; wait for it, or give another folder with --to")
        _refuse_taken(target)  # by a pull that has just ended
        yield work
    finally:
        os.close(folder)


@contextlib.contextmanager
def _asking(url: str) -> Iterator[Any]:
    """An HfApi; whatever it finds wrong becomes one sentence."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise UserError(
            f"{url} needs huggingface_hub, which is not installed: pip install 'normfree[export]'"
        ) from None
    disable_progress_bars()
    try:
        yield HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN") or False)
    except HFValidationError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())[:300]}; write hf://ORG/NAME as the Hub has it") from None
    except RevisionNotFoundError:
        raise UserError(f"{url}: there is no such branch, tag or commit; give another after the @") from None
    except RepositoryNotFoundError:
        raise UserError(f"{url} is not there, or is not for everybody: look at the name, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = Hidden(os.environ).in_text(str(error).strip().splitlines()[-1][:300])
        raise UserError(
            f"{url}: {_REFUSED.get(status, f'the server says {status}, try again later')} ({said})"
        ) from None
    except UserError:
        raise
    except Exception as error:  # of its HTTP library, of its other one (xet), or of a malformed answer
        if isinstance(error, OSError) and error.filename is not None:  # of this machine's disk
            raise
        said = Hidden(os.environ).in_text(f"{type(error).__name__}: {error}"[:300])
        raise UserError(f"{url} cannot be reached, or answers what is no answer ({said}); try again later") from None
