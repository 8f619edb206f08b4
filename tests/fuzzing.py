"""Fuzzing by mutation: inputs from fixed seeds, read in a forked child that is held to a time, a memory and a folder.

    outcome = fuzz(read, mutants([a_good_file, another], 500), tmp_path)

`read(data)` must return, or raise one of `refusals`. Anything else fails the test: another exception, more than a second
of processor time, more than 500 MB above what the process had, the death of the child, a file opened for writing or
removed outside `folder`, a file read below `private`, a process or a connection started.
"""

import contextlib
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

LIMIT_S = (
    1.0  # of processor time, so that a loaded machine changes nothing, of a core that counts to a million in 0.02 s
)
LIMIT_BYTES = 500_000_000
MAX_WALL_S = 60  # for what sleeps
TOO_LONG = f"more than {LIMIT_S:g} s"
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_TOKENS = (
    b"\0", b"\xff", b"\n", b"\r", b'"', b",", b"/", b"..", b"../../", b"::", b"://", b"-1", b"-2", b"1e999", b"NaN",
    b"9" * 40, b"9" * 6000, b"[" * 5000, b'{"a":' * 3000, b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xed\xa0\x80",
)  # fmt: skip


class TooLong(BaseException):
    """Past the limit of time; no Exception, so that no handler of the code under test swallows it."""


def mutants(seeds: Sequence[bytes], num: int, *, seed: int = 0, tokens: Sequence[bytes] = ()) -> Iterator[bytes]:
    """The seeds themselves, then `num` inputs made of them by one to eight random changes each."""
    yield from seeds
    draw = random.Random(seed)
    words = (*_TOKENS, *tokens)
    for _ in range(num):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 1, 2, 3, 8))):
            _change(data, draw, seeds, words)
        yield bytes(data)


def _change(data: bytearray, draw: random.Random, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = draw.randrange(len(data) + 1) if draw.random() < 0.5 else draw.randrange(min(len(data), 512) + 1)
    span = min(draw.choice((1, 2, 4, 16, 64, 512)), len(data) - at)
    kind = draw.randrange(9)
    if kind == 0 and data:
        data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        data[at : at + span] = draw.randbytes(span)
    elif kind == 2:
        size = draw.choice((1, 2, 4, 8))
        number = draw.choice(_NUMBERS) & ((1 << 8 * size) - 1)
        data[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
    elif kind == 3:
        del data[at : at + span]
    elif kind == 4:
        data[at:at] = data[at : at + span] * draw.choice((1, 2, 30))
    elif kind == 5:
        data[at:at] = draw.choice(words)
    elif kind == 6:
        word = draw.choice(words)
        data[at : at + len(word)] = word
    elif kind == 7:
        other = draw.choice(seeds)
        data[at:] = other[draw.randrange(len(other) + 1) :]
    else:
        del data[at:]


def fuzz(
    read: Callable[[bytes], object],
    inputs: Iterable[bytes],
    folder: Path,
    *,
    refusals: tuple[type[BaseException], ...] = (UserError,),
    private: Path | None = None,
) -> Counter[str]:
    """How many inputs were read and how many refused, as {"read": n, "refused": m}; AssertionError for all else.

    The input that fails is kept as `folder/failed`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        status = 1
        try:
            _child(read, inputs, folder, refusals, private, send)
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as pipe:
        lines = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    assert "failed" not in last, f"{last['failed']} (the input is {folder}/failed)"
    assert status == 0 and "counts" in last, f"the reader died with {status} (the input is {folder}/failed)"
    return Counter(last["counts"])


def _child(
    read: Callable[[bytes], object],
    inputs: Iterable[bytes],
    folder: Path,
    refusals: tuple[type[BaseException], ...],
    private: Path | None,
    send: int,
) -> None:
    read_once = iter(inputs)
    broken: list[str] = []
    first = next(read_once)
    with contextlib.suppress(*refusals):  # imports and caches are made by a first reading that nothing limits
        read(first)
    limit_s = _limit_s()
    _limit_memory()
    _watch(folder, private, broken)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, _stop)
    counts: Counter[str] = Counter()
    for number, data in enumerate(itertools.chain([first], read_once)):
        (folder / "failed").write_bytes(data)
        failure = _one(read, data, refusals, counts, limit_s)
        if (
            failure == TOO_LONG
        ):  # a collection of garbage, which copies this fork's pages, may have fallen into it: once more
            failure = _one(read, data, refusals, counts, limit_s)
        failure = failure or (broken[0] if broken else None)
        if failure:
            os.write(send, json.dumps({"failed": f"input {number}: {failure}"}).encode())
            return
    (folder / "failed").unlink()
    os.write(send, json.dumps({"counts": counts}).encode())


def _limit_s() -> float:
    """LIMIT_S, and in proportion more on a slower core."""
    begin_s = time.process_time()
    for _ in range(1_000_000):
        pass
    return LIMIT_S * max(1.0, (time.process_time() - begin_s) / 0.02)


def _one(
    read: Callable[[bytes], object],
    data: bytes,
    refusals: tuple[type[BaseException], ...],
    counts: Counter[str],
    limit_s: float,
) -> str | None:
    """None, or what went wrong with one input."""
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    signal.setitimer(signal.ITIMER_REAL, MAX_WALL_S)
    try:
        read(data)
        counts["read"] += 1
    except refusals as error:
        counts["refused"] += 1
        if " object at 0x" in str(error) or "\n" in str(error):
            return f"a refusal that is no sentence: {error}"
    except TooLong:
        return TOO_LONG
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def _stop(*_: object) -> None:
    raise TooLong


def _limit_memory() -> None:
    """Allocations beyond what is there now plus the limit raise MemoryError; counted are pages that may be written."""
    try:
        with open("/proc/self/status") as status:
            now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + LIMIT_BYTES, resource.RLIM_INFINITY))
    except (OSError, StopIteration):
        pass  # no Linux: time and places are watched all the same


def _watch(folder: Path, private: Path | None, broken: list[str]) -> None:
    """Write down what Python's audit events say of files outside `folder`, processes and connections."""
    own = os.path.realpath(folder)
    secret = os.path.realpath(private) if private else None

    def inside(path: object, root: str) -> bool:
        return (os.path.realpath(os.fsdecode(path)) + "/").startswith(root + "/")  # type: ignore[arg-type]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            path, flags = args[0], args[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and not inside(path, own):
                broken.append(f"{path!r} was opened for writing")
            elif secret and inside(path, secret):
                broken.append(f"{path!r} was read")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            for path in args[:2]:
                if isinstance(path, str | bytes) and not inside(path, own):
                    broken.append(f"{event} of {path!r}")
        elif event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "socket.connect",
            "socket.getaddrinfo",
        ):
            broken.append(f"{event} {str(args)[:200]}")

    sys.addaudithook(hook)
