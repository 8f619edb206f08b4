"""What a trial's entry says about where it ran: the code's revision, and the most memory that it took."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import subprocess
from pathlib import Path


@functools.cache
def code_revision() -> str:
    """Git's commit of the checkout, with + where files differ from it; the package's version where there is no checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        if not (root / ".git").exists():
            raise OSError
        found = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
        return found[0].strip() + ("+" if found[1].strip() else "")
    except (OSError, subprocess.SubprocessError):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return "version " + importlib.metadata.version("normfree")
        return "unknown"


class Memory:
    """The most that was in use between its making and `max_bytes`: of the GPU where there is one, else of this process.

    A process that has run other trials keeps some of what they took; Linux lets the mark be set back to what is held now.
    """

    def __init__(self) -> None:
        import torch

        self._gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def max_bytes(self) -> int:
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return int(torch.cuda.max_memory_allocated())
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        return 0
