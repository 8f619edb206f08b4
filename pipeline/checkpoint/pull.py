"""A checkpoint from anywhere into a local folder that appears whole, verified, or not at all; a broken pull goes on.

    DIR.partial/fragments-...safetensors    preallocated, filled in parts, several at a time, in any order
                .partial-pull.jsonl         which commit this is, a line for each part that has arrived; locked while one pulls
                commit.json                 last, when every file has the size and the SHA-256 that it names
    DIR                                     DIR.partial, renamed

The parts on disk are only ever believed after the whole file's SHA-256, so a power cut or a part of another version costs a
second download of that file and nothing else. Nothing is unpickled; a commit file that names anything but *.safetensors is
refused before a byte of it is fetched.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import documents
from pipeline.checkpoint.commit import COMMIT, Commit, committed, parse_commit, read_commit, refuse_pickle
from pipeline.checkpoint.download import JOURNAL, NUM_AT_ONCE, Damaged, Download, Progress, journal_of, verifies
from pipeline.errors import UserError
from pipeline.records import PassedOver
from pipeline.storage import objects


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a pull has made."""

    folder: Path
    commit: Commit
    """Of the checkpoint at its source."""
    fetched_bytes: int
    """Now; not what an earlier, broken pull had fetched."""
    passed: list[PassedOver] = field(default_factory=list)
    """Newer checkpoints of the run that do not verify."""


def pull(
    url: str,
    to: str | os.PathLike[str],
    *,
    digest: str | None = None,
    connections: int = NUM_AT_ONCE,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a checkpoint, or the newest one of a run folder that verifies, into the local folder `to`.

    Args:
        digest: SHA-256 that the commit file must have.
    Raises:
        UserError: no checkpoint there, not the one that was asked for, no room, something else at `to`, a store that stopped
            answering. `to` is then as it was; what has arrived waits in `to`.partial for the next call.
    """
    refuse_pickle(url)
    target = target_of(to)
    if objects.exists(objects.join(url, COMMIT)):
        return _fetch(url, target, digest, connections, progress, [])
    passed: list[PassedOver] = []
    while True:  # listed again each time: a run that goes on deletes old checkpoints and makes new ones
        bad = {p.url for p in passed}
        candidates = [u for u in committed(url) if u not in bad]
        if not candidates:
            why = f"; {passed[0].reason}" if passed else ""
            raise UserError(f"no checkpoint at {url}{why}; give a run folder, or a folder with {COMMIT}")
        try:
            return _fetch(candidates[0], target, digest, connections, progress, passed)
        except Damaged as error:
            passed.append(PassedOver(step=0, url=candidates[0], reason=str(error)))


def target_of(to: str | os.PathLike[str]) -> Path:
    """The absolute path of the folder that a pull makes. UserError for what is not on this machine."""
    if not objects.is_local(to):
        raise UserError(f"--to is {os.fspath(to)}, and a pull ends in a folder of this machine; give a local path")
    return Path(os.path.abspath(objects.local_path(to)))  # "." has no name that another could be made of


def _fetch(
    url: str, target: Path, digest: str | None, connections: int, progress: Progress | None, passed: list[PassedOver]
) -> Pulled:
    try:
        data = objects.read_bytes(objects.join(url, COMMIT), max_bytes=documents.MAX_BYTES + 1)
    except FileNotFoundError:
        raise Damaged(f"{url} was deleted while it was looked for; pull again") from None
    commit = parse_commit(url, data)
    if digest is not None and commit.digest != digest:
        raise UserError(
            f"{url} is not the checkpoint that was registered: its {COMMIT} has SHA-256 {commit.digest[:12]}, registered was "
            f"{digest[:12]}; it was replaced or tampered with, pull another version"
        )
    if _is_there(target, commit):
        return Pulled(folder=target, commit=commit, fetched_bytes=0, passed=passed)
    work = target.with_name(f"{target.name}.partial")
    with journal_of(work, commit) as (journal, done):
        if _is_there(target, commit):  # another pull was first
            shutil.rmtree(work)
            return Pulled(folder=target, commit=commit, fetched_bytes=0, passed=passed)
        download = Download(commit, work, journal, done, connections, progress)
        try:
            download.run()
        except Damaged:
            shutil.rmtree(work)
            raise
        objects.write_bytes(work / COMMIT, data)
        try:
            os.rename(work, target)
        except OSError as error:
            raise UserError(f"cannot make {target} ({error.strerror}); give another folder with --to") from None
        (target / JOURNAL).unlink()
    return Pulled(folder=target, commit=commit, fetched_bytes=download.fetched_bytes, passed=passed)


def _is_there(target: Path, commit: Commit) -> bool:
    """True if the folder holds this very checkpoint, every byte of it; UserError if it holds anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        held = read_commit(str(target))
    except (OSError, UserError):
        raise UserError(f"{target} is there already and is no checkpoint; give another folder with --to") from None
    if held.digest != commit.digest:
        raise UserError(f"{target} holds another checkpoint (step {held.step}); give another folder with --to")
    for info in commit.files:
        if not verifies(target / info["name"], info):
            raise UserError(
                f"{target} holds this checkpoint and is damaged ({info['name']}); delete it, then pull again"
            )
    (target / JOURNAL).unlink(missing_ok=True)  # of a pull that was killed at its very end
    return True
