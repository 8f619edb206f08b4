"""One host that is examined from here: its process, a question at a time, an answer to each within a time."""

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.child_process import FOLDER, child_environment
from orchestration.doctor.messages import MARK, MAX_BYTES, REMEDY
from pipeline import documents
from pipeline.errors import UserError

MODULE = "orchestration.doctor.host"
END_S = 5.0


class Unanswered(Exception):
    """Why a host did not answer, in words."""


class Conversation:
    """From `with` on. Not to be used by two threads at once."""

    def __init__(self, name: str, words: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """Args:
        words: that start `orchestration.doctor.host -` on the host; empty: a child of this process.
        environment: of the process here.
        """
        self.name, self._is_here = name, not words
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._errors: list[str] = []
        self.heard_s = 0.0
        """When the newest answer came, by this machine's clock."""
        self._process = subprocess.Popen(
            [*words] if words else [sys.executable, "-P", "-m", MODULE, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(environment) if self._is_here else None,
            cwd=FOLDER if self._is_here else None,
            start_new_session=True,  # Ctrl-C is for this process alone, which ends it
        )
        for work in (self._read, self._read_errors):
            threading.Thread(target=work, daemon=True).start()

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._process.kill()
        self._process.wait()

    def ask(self, do: str, *, limit_s: float, **words: Any) -> Any:
        """The answer, as plain containers.

        Raises:
            Unanswered: the host is not there, has ended, says nothing in time, or could not do it.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **words}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Unanswered(self._why()) from None
        said = self._answer(time.monotonic() + limit_s, limit_s)
        if "failed" in said:
            raise Unanswered(documents.excerpt(said["failed"], 1000))
        return said.get("found")

    def _answer(self, deadline_s: float, limit_s: float) -> Mapping[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise Unanswered(f"no answer within {limit_s:.0f} s") from None
            if line is None:
                raise Unanswered(self._why())
            with contextlib.suppress(UserError):  # a greeting
                said = documents.parse_json(line, f"what {self.name} says", max_bytes=MAX_BYTES, remedy=REMEDY)
                if isinstance(said, dict) and isinstance(said.get(MARK), dict):
                    found: Mapping[str, Any] = said[MARK]
                    return found

    def _why(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        last = next((line for line in reversed(self._errors) if line.strip()), "")
        return f"its process ended with code {self._process.poll()}{f' ({last[:300]})' if last else ''}"

    @property
    def code(self) -> int | None:
        """Exit code of its process; None while that lives."""
        return self._process.poll()

    @property
    def errors(self) -> Sequence[str]:
        """Last lines of its standard error."""
        return self._errors

    def _read(self) -> None:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline(MAX_BYTES):
            self.heard_s = time.time()
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while line := self._process.stderr.readline(1 << 16):
            self._errors = [*self._errors, line.decode("utf-8", "replace").rstrip()][-20:]
