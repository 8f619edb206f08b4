"""The one exception that stands for a mistake of the user."""


class UserError(ValueError):
    """What the user can mend: one clear sentence that says what is wrong, where, and what to change.

    The command line prints the sentence alone and exits with 2; every other exception is ours (exit 1).
    """
