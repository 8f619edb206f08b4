"""Exceptions that stand for a mistake of the user, and not for one of ours."""

from collections.abc import Sequence


class UserError(ValueError):
    """What the user can mend: one clear sentence that says what is wrong, where, and what to change.

    The command line prints the sentence and exits with 2; every other exception is ours (exit 1).
    """

    table: Sequence[str] = ()
    """Lines under the sentence, where there is more than it can hold."""


class Diverged(UserError):
    """A training whose loss, gradients or scores are not finite: a result of its settings, the same each time that it is run."""
