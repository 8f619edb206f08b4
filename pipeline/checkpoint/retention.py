"""Which checkpoints of a run stay, and deleting the others so that no kill leaves one that looks whole and is not.

Kept are the newest `last`, every one at a multiple of `every_steps`, the `best` by a metric, and always: those with a file
`KEEP` (whoever refers to a checkpoint pins it, see `pin`) and those with a file `DAMAGED` (passed over at a start, kept for
inspection; they do not count among the newest). A commit file is deleted before what it names. Files without a commit file are
what a killed save or a killed deletion left: they go when they are older than the newest commit.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.checkpoint.commit import COMMIT, checkpoints_url, place_in_order, read_commit
from pipeline.errors import UserError
from pipeline.records import PassedOver
from pipeline.storage import objects
from pipeline.supervision.fault_points import reach

KEEP, DAMAGED = "KEEP", "DAMAGED"
BY_HAND = "pinned by hand"
"""What an empty KEEP says."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which committed checkpoints stay, besides pinned and damaged ones."""

    last: int = 2
    every_steps: int = 0
    """0: none for being at a round step."""
    best: int = 0
    metric: str = "top1"
    """Of the commit file's evaluation; "loss" is better when lower, all others when higher."""


@dataclass(frozen=True)
class Kept:
    """What retention needs to know of a committed checkpoint."""

    url: str
    place: tuple[int, int]
    """(step, attempt)"""
    is_marked: bool
    """Pinned or damaged."""
    evaluation: dict[str, float] = field(default_factory=dict)


def to_delete(found: Iterable[Kept], policy: Policy) -> list[str]:
    """URLs of those that no rule keeps, oldest first. Pure."""
    ordered = sorted((k for k in found if not k.is_marked), key=lambda k: k.place)
    kept = {k.url for k in ordered[-policy.last :]}
    if policy.every_steps:
        kept |= {k.url for k in ordered if k.place[0] % policy.every_steps == 0}
    if policy.best:
        sign = 1.0 if policy.metric == "loss" else -1.0
        # Of several with one evaluation the oldest stands closest to the weights that were evaluated: sorted is stable.
        scored = [k for k in ordered if policy.metric in k.evaluation]
        kept |= {k.url for k in sorted(scored, key=lambda k: sign * k.evaluation[policy.metric])[: policy.best]}
    return [k.url for k in ordered if k.url not in kept]


def retain(run_dir: str, policy: Policy, in_flight: str | None = None) -> list[str]:
    """Delete what the policy does not keep, and leftovers older than the newest commit; URLs of what is gone.

    `in_flight` is never touched. May be interrupted anywhere and called again. UserError that counts those whose deletion was
    refused, when all others are gone: what is left of them is no checkpoint, and the next call finds it.
    """
    folders = _folders(run_dir)
    if in_flight and objects.is_local(in_flight):
        in_flight = str(objects.local_path(in_flight))
    places = {u: place for u in folders if (place := place_in_order(u)) is not None}
    found = [_kept(u, places[u], folders[u], policy) for u in places if COMMIT in folders[u]]
    newest = max((k.place for k in found if not k.is_marked), default=(-1, 0))
    reach("retention")
    old = to_delete(found, policy)
    leftovers = [
        url
        for url, place in places.items()
        if place < newest and url != in_flight and not {COMMIT, KEEP, DAMAGED} & folders[url]
    ]
    gone, refused = [], []
    for url in old + leftovers:
        try:
            if url in leftovers or _uncommit(url):
                objects.remove_tree(url)
                reach("files deleted")
                gone.append(url)
        except (UserError, PermissionError) as error:
            refused.append(error)
    if refused:
        raise UserError(f"{len(refused)} of {len(old + leftovers)} are tried again after the next save: {refused[0]}")
    return gone


def _uncommit(url: str) -> bool:
    """Delete the commit file; False if the checkpoint was pinned since the listing."""
    if objects.exists(objects.join(url, KEEP)):
        return False
    objects.remove(objects.join(url, COMMIT))
    reach("commit deleted")
    return True


def pin(url: str, why: str) -> None:
    """Keep this checkpoint whatever the run's settings say, until `unpin` or until the file KEEP in it is deleted.

    KEEP holds a line for each reason. Raises UserError if there is no checkpoint (any more): pin first, then use.
    """
    there = pins(url)
    if why not in there:
        objects.write_bytes(objects.join(url, KEEP), "".join(f"{line}\n" for line in [*there, why]).encode())
    if not objects.exists(objects.join(url, COMMIT)):
        with contextlib.suppress(OSError):
            objects.remove(objects.join(url, KEEP))
        raise UserError(f"{url} is no checkpoint (any more), so it cannot be kept; name one that has a {COMMIT}")


def pins(url: str) -> list[str]:
    """Why this checkpoint is kept, a line each; [] if nobody pinned it."""
    try:
        return objects.read_bytes(objects.join(url, KEEP)).decode(errors="replace").splitlines() or [BY_HAND]
    except FileNotFoundError:
        return []


def unpin(url: str, why: str) -> None:
    """Take one reason back; the file KEEP goes with the last one. Nothing happens if it is not kept for that."""
    there = pins(url)
    if why not in there:
        return
    left = [line for line in there if line != why]
    if left:
        objects.write_bytes(objects.join(url, KEEP), "".join(f"{line}\n" for line in left).encode())
    else:
        objects.remove(objects.join(url, KEEP))


def mark_damaged(bad: PassedOver) -> PassedOver:
    """Write next to a checkpoint that it was passed over and why: it is not deleted, and not counted among the newest.

    A run starts without the mark where it cannot be written; the record that is returned then says so.
    """
    try:
        objects.write_bytes(objects.join(bad.url, DAMAGED), f"{bad.reason}\n".encode())
    except (OSError, UserError) as error:  # UserError: the store lets this machine read only
        unmarked = f"{bad.reason} (and it could not be marked, so it may be deleted as an old one: {error})"
        return dataclasses.replace(bad, reason=unmarked)
    return bad


def folder_names(run_dir: str) -> set[str]:
    """Names of all folders under the run's checkpoints, committed or not."""
    return {u.rsplit("/", 1)[-1] for u in _folders(run_dir)}


def _folders(run_dir: str) -> dict[str, set[str]]:
    """URL of each folder under checkpoints -> names of what lies in it; temporary names included, empty folders too."""
    root = checkpoints_url(run_dir)
    folders: dict[str, set[str]] = {}
    for url in objects.list_urls(root):
        folder, name = url.rsplit("/", 1)
        folders.setdefault(folder, set()).add(name)
    if objects.is_local(root) and (path := objects.local_path(root)).is_dir():
        for entry in path.iterdir():  # a killed save's folder may hold temporary names only, which are not listed
            if (
                entry.is_dir()
            ):  # spelled as the listing spells it: "./run" and "file:///run" lose what is before the path
                folders.setdefault(str(entry), set())
    return folders


def _kept(url: str, place: tuple[int, int], names: set[str], policy: Policy) -> Kept:
    is_marked, evaluation = bool({KEEP, DAMAGED} & names), {}
    if policy.best and not is_marked:
        try:
            evaluation = read_commit(url).evaluation
        except UserError:  # unreadable: for a person to look at
            is_marked = True
    return Kept(url, place, is_marked, evaluation)


def remove_abandoned(url: str) -> None:
    """Delete what a failed save of this run wrote, unless it came to be committed after all. Never raises.

    What cannot be deleted now is a leftover, which `retain` deletes when a newer checkpoint stands.
    """
    with contextlib.suppress(Exception):
        if not objects.exists(objects.join(url, COMMIT)):
            objects.remove_tree(url)
