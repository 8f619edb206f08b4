"""Names for stretches of a step, which a profile shows. Without one they are nothing: a look at a variable."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

PREFIX = "phase: "
"""Before the name of a range, by which it is found among the profiler's own."""
_NOTHING: AbstractContextManager[Any] = nullcontext()
_is_on = False


def span(name: str) -> AbstractContextManager[Any]:
    """The block inside is part of the phase `name`."""
    return torch.profiler.record_function(PREFIX + name) if _is_on else _NOTHING


@contextmanager
def spans_on(calls: Iterable[tuple[Any, str]] = (), name: str = "") -> Iterator[None]:
    """Inside, `span` names ranges, and so do calls of these methods (owner, method) of objects, all by one `name`."""
    global _is_on
    with ExitStack() as stack:
        for owner, method in calls:
            setattr(owner, method, _named(getattr(owner, method), name))
            stack.callback(delattr, owner, method)
        _is_on = True
        try:
            yield
        finally:
            _is_on = False


def _named(call: Any, name: str) -> Any:
    @functools.wraps(call)
    def named(*args: Any, **options: Any) -> Any:
        with span(name):
            return call(*args, **options)

    return named
