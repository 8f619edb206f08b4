"""Exceptions that stand for a mistake of the user, and not for one of ours."""

import errno
from collections.abc import Sequence


class UserError(ValueError):
    """What the user can mend: one clear sentence that says what is wrong, where, and what to change.

    The command line prints the sentence and exits with 2; every other exception is ours (exit 1).
    """

    table: Sequence[str] = ()
    """Lines under the sentence, where there is more than it can hold."""
    place: str | None = None
    """Of what is wrong in its document, as `methods.ridge.l2` or `tasks[1]`; empty = all of it, None = not known."""

    @classmethod
    def at(cls, place: str, sentence: str) -> "UserError":
        error = cls(sentence)
        error.place = place
        return error


class Diverged(UserError):
    """A training whose loss, gradients or scores are not finite: a result of its settings, the same each time that it is run."""


PLACES = frozenset(
    {
        *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    }
)
"""What the system says of a place that cannot be written or read as it is."""


def place_trouble(error: BaseException) -> str | None:
    """A sentence for the end of a command that met a full, read-only or forbidden place; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in PLACES:
        return None
    names = [str(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    where = " and ".join(names) or "a file"
    return (
        f"{where}: {error.strerror}; mend that, or give another place (temporary files: TMPDIR, caches: NORMFREE_CACHE)"
    )
