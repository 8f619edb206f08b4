"""Exported folders on the Hugging Face Hub, or a server that speaks like it (HF_ENDPOINT): `hf://ORG/NAME[@REVISION]`.

A push is one commit, so that a repository holds all files of an export or none. A pull fetches what `export.json` names, of
one commit, and its folder appears when every file has the size and the SHA-256 that stand there. The token comes from
HF_TOKEN alone, and stands in no message.
"""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import exported
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


def pull(url: str, to: str, *, connections: int = 8) -> exported.Verified:
    """Fetch an exported folder into the new local folder `to`; what has arrived of a broken pull waits in `to`.partial.

    Raises:
        UserError: no such repository or revision, no exported folder in it, damage, something else at `to`, a server that
            cannot be reached.
    """
    place, target = parse(url), Path(to)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is not empty; give another folder with --to")
    work = target.with_name(f"{target.name}.partial")
    with _asking(url) as hub:
        from huggingface_hub.errors import EntryNotFoundError

        commit = hub.model_info(place.repository, revision=place.revision).sha
        try:
            hub.hf_hub_download(place.repository, exported.NAME, revision=commit, local_dir=work)
        except EntryNotFoundError:
            shutil.rmtree(work, ignore_errors=True)
            raise UserError(
                f"{url} has no {exported.NAME}, so it was not pushed by normfree; give one that was"
            ) from None
        names = [file["name"] for file in exported.listed(work).files]
        hub.snapshot_download(
            place.repository,
            revision=commit,
            allow_patterns=[glob.escape(name) for name in names],
            local_dir=work,
            max_workers=connections,
        )
    try:
        found = exported.verify(work)
    except UserError:
        shutil.rmtree(work)
        raise
    shutil.rmtree(work / ".cache", ignore_errors=True)  # the library's own account of what has arrived
    os.replace(work, target)
    return found


@contextlib.contextmanager
def _asking(url: str) -> Iterator[Any]:
    """An HfApi; whatever it finds wrong becomes one sentence."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise UserError(
            f"{url} needs huggingface_hub, which is not installed: pip install 'normfree[export]'"
        ) from None
    disable_progress_bars()
    try:
        yield HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN") or False)
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
