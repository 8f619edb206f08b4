"""What a command says while something takes long ("evaluating ... (3 s)") depends on the machine's speed; tests read the rest."""

import re

_WAITING = re.compile(r".* \.\.\. \(\d+ s\)")


def sentences(text: str) -> list[str]:
    """Lines of what a command printed, without those that only say that it is still at work."""
    return [line for line in text.strip().splitlines() if not _WAITING.fullmatch(line)]
