"""What a pickle would do, looked at before it runs: a pickle is a program for a machine with a stack."""

import pickletools
from collections.abc import Iterator
from typing import Any

_MAX_OPCODES = 300_000
"""Of a program: three sets of the largest published network's parameters need 100,000."""
_MAX_TUPLE_ITEMS = 1_000_000
"""Of all tuples that are made or fetched again, with the tuples in them counted in full: what hashing them takes at most."""
_MAX_NAME = 300
_LARGE, _MAX_LARGE = 2**61 - 1, 1000
"""Whole numbers from here on can be chosen to have one hash, as keys of a dictionary that then takes quadratic time."""


class Refused(ValueError):
    """What a file asked for and is not given."""


_EXTENSIONS = ("EXT1", "EXT2", "EXT4")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")


def check_program(data: Any) -> None:
    """One pass over a pickle before it runs: every length fits the file, no name is hidden behind a number, no tuple is huge.

    Tuples are the only containers that can be hashed: 64 of two references each, one in the other, take 2^64 steps as a key.
    So what lies on the unpickler's stack is followed as far as tuples go: an item is the number of items in it.

    Raises:
        ValueError: refused, or no pickle.
    """
    stack: list[Any] = []
    marks = pickletools.markobject
    places: dict[int, int] = {}
    total = large = 0
    program: Iterator[tuple[pickletools.OpcodeInfo, Any, Any]] = pickletools.genops(data)
    for count, (opcode, argument, _) in enumerate(program):
        name = opcode.name
        # The unpickler would look these up in the process's own registry, past `find_class`.
        if name in _EXTENSIONS:
            raise Refused(f"it asks for extension {argument} of the copyreg registry")
        # Places are numbered as they are used; a large number would make the unpickler ask for as much memory.
        if name in _PUTS and argument > count:
            raise Refused(f"it uses place {argument} of its memory before place {count}")
        if name in ("GLOBAL", "INST") and len(argument) > _MAX_NAME:  # torch searches its own message of it, slowly
            raise Refused(f"it asks for a name of {len(argument)} characters")
        large += isinstance(argument, int) and not -_LARGE < argument < _LARGE
        if count > _MAX_OPCODES or total > _MAX_TUPLE_ITEMS or large > _MAX_LARGE:
            raise Refused("it has more steps, larger tuples or more large numbers than any weights")
        if name in _PUTS or name == "MEMOIZE":
            places[len(places) if name == "MEMOIZE" else int(argument)] = _top(stack)
            continue
        before = list(opcode.stack_before)
        if name == "POP" and stack and stack[-1] is marks:
            before = [marks]
        taken: list[int] = []
        if marks in before or pickletools.stackslice in before:
            while stack and stack[-1] is not marks:
                taken.append(stack.pop())
            before = before[: before.index(marks)] if stack else before
            if not stack:
                raise ValueError("a mark is missing")
            stack.pop()
        if len(before) > len(stack) or marks in stack[len(stack) - len(before) :]:
            raise ValueError("its stack runs empty")
        taken += [stack.pop() for _ in before]
        size = 1 + sum(taken) if name.startswith(("TUPLE", "EMPTY_TUPLE")) else 1
        if name in _GETS:
            size = places.get(int(argument), 1)
        elif name == "DUP":
            size = taken[0]
        total += size if size > 1 else 0
        stack += [marks if item is marks else size for item in opcode.stack_after]


def _top(stack: list[Any]) -> int:
    if not stack or stack[-1] is pickletools.markobject:
        raise ValueError("its stack runs empty")
    return int(stack[-1])
