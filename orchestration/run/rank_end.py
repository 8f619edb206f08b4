"""How a rank ended, for the agent that started it: a file, since torch's elastic agent takes any code but 0 for a failure.

It would send SIGTERM to the other ranks of its host at once, in the middle of their saves, and start all of them again. So a
rank that ends as it should (finished, stopped, the user's mistake) leaves its code in a file and ends with 0; one that fails
ends with its own code.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.supervision.stop_signals import EXIT_REQUEUE

EXIT_OURS, EXIT_USER = 1, 2
EXIT_CUT_OFF = 69
"""Of an agent, EX_UNAVAILABLE: its host does not reach the job any more, which may go on without it."""
FOLDER = "NORMFREE_RANK_ENDS"
"""The variable that names the agent's folder for these files."""


@dataclass(frozen=True)
class RankEnd:
    code: int
    is_signalled: bool
    """This rank itself got a stop signal, and did not hear of it from another."""


def leave(code: int, *, is_signalled: bool) -> int:
    """The code that the process is to end with; the file of this process is written where an agent asked for it."""
    folder = os.environ.get(FOLDER)
    if not folder or code not in (0, EXIT_USER, EXIT_REQUEUE):
        return code
    with contextlib.suppress(OSError):  # the agent is gone, or its disk is full: it sees the code
        path = Path(folder) / str(os.getpid())
        path.with_suffix(".part").write_text(json.dumps({"code": code, "is_signalled": is_signalled}))
        path.with_suffix(".part").rename(path)
        return 0
    return code


def read(folder: Path, pid: int) -> RankEnd | None:
    """What the process left; None if it left nothing."""
    try:
        return RankEnd(**json.loads((folder / str(pid)).read_text()))
    except FileNotFoundError:
        return None
