"""The pin that keeps a registered checkpoint from its run's retention."""

from orchestration.tracking.tracking_uri import sqlite_file, sqlite_uri
from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import retention
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage import objects


def pin_reason(name: str, uri: str) -> str:
    """The line that keeps a registered checkpoint."""
    return f"registered as {name} in {tracker_name(uri)}"


def tracker_name(uri: str) -> str:
    """A tracker's name for people and for comparison: without passwords, a file by its whole path."""
    file = sqlite_file(uri)
    return sqlite_uri(file) if file is not None else public(uri).rstrip("/")


def pin_for(url: str, why: str) -> tuple[bool, str]:
    """(whether this pinned it, what to say where it could not be)."""
    try:
        if why in retention.pins(url):
            return False, ""
        retention.pin(url, why)
    except (OSError, UserError) as error:
        if not objects.exists(objects.join(url, checkpoint.COMMIT)):
            raise
        return False, f"it could not be pinned, so its run may delete it ({' '.join(str(error).split())[:200]})"
    return True, ""
