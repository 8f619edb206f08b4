"""Who this process is, of how many: the only reader of the variables by which launchers say it. Imports no torch."""

import os
from dataclasses import dataclass

from pipeline.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""A launcher sets all of them."""
TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set where torch's launcher started this process."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the environment says of this process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    overlooked: str = ""
    """What stands there without a launcher, in a sentence."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """What the launcher's variables say. Without a WORLD_SIZE above 1 a process is alone, whatever else was left in its
    environment.

    Raises:
        UserError: WORLD_SIZE says that there are several processes, and the rest is missing or has no meaning: to go on alone
            could be several runs in one folder.
    """
    given = {name: os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").strip()}
    listed = ", ".join(f"{name}={text}" for name, text in given.items())
    size = _number("WORLD_SIZE", given, 1, listed)
    if size == 1:
        odd = [name for name in ("RANK", "LOCAL_RANK") if given.get(name, "0") != "0"]
        text = f"{' and '.join(odd)} set, WORLD_SIZE not above 1: this process runs alone" if odd else ""
        return Place(overlooked=text)
    missing = [name for name in RANK_VARIABLES if name not in given]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set to {size}, but no launcher is there ({', '.join(missing)} not set): unset WORLD_SIZE and RANK, "
            "or start with torchrun or --num-processes"
        )
    rank, local_rank = (_number(name, given, 0, listed) for name in ("RANK", "LOCAL_RANK"))
    if rank >= size or local_rank > rank or _number("MASTER_PORT", given, 1, listed) > 65535:
        raise UserError(
            f"the variables of a launcher contradict each other ({listed}): unset them, or start with torchrun or "
            "--num-processes"
        )
    return Place(rank=rank, size=size, local_rank=local_rank)


def _number(name: str, given: dict[str, str], least: int, listed: str) -> int:
    text = given.get(name, "1").strip()
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < least:
        raise UserError(
            f"{name} is {text!r}, which is no whole number from {least} on ({listed}): unset it and the other variables of a "
            "launcher, or start with torchrun or --num-processes"
        )
    return int(text)


def is_main() -> bool:
    """Whether this process speaks for its group; one that cannot know speaks for itself."""
    return _place_or_alone().is_main


def is_alone() -> bool:
    """Whether there is no other rank to tell anything, as far as this process can know."""
    return _place_or_alone().size == 1


def _place_or_alone() -> Place:
    try:
        return place()
    except UserError:
        return Place()


def num_hosts() -> int:
    """Machines of the run, by the launcher's LOCAL_WORLD_SIZE; 1 where it says nothing."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    size = place().size
    return max(1, size // int(local)) if local.isdecimal() and int(local) > 0 else 1
