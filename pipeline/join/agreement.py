"""Before step 0 all ranks agree: the same code, libraries, configuration, data, devices and run folder, clocks that agree.

    main rank    says what it is made of (`messages.Opening`)
    each rank    holds its own against that and says what differs (`Answer`)
    main rank    refuses, or owns the run folder and says by which mark it is known (`Owned`)
    each rank    looks for the mark in its own `--out`, and says what it found and what its clock shows (`Seen`)
    main rank    refuses, or lets all go on (`Verdict`)

All of it goes through the store by which the ranks find each other, before there is a process group: ranks with unlike devices or
libraries may never make one. A rank sends and reads a few kilobytes, however many ranks there are.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline import distributed
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.join import host_differences
from pipeline.join.messages import Answer, Opening, Owned, Seen, Verdict, read
from pipeline.records import Changed
from pipeline.storage import objects
from pipeline.storage.ownership import Holder, hold
from pipeline.storage.process_identity import this_process
from pipeline.supervision.rank_environment import TORCHRUN, Place, place

SEEN_S = 15.0
"""A network disk may take this long to show a machine what another one wrote."""
CLOCK_S = 5.0
"""Clocks that differ by more are reported: a timeline of several hosts is out of order by as much;"""
CLOCK_LIMIT_S = 300.0
"""and by more than this, refused: stores take no signature that is 15 minutes off, and owners of folders are taken for dead."""
MAX_DIFFERENCES, MAX_TEXT = 16, 200
HEARD_S = 10.0
NOTHING: Mapping[str, str] = {}
T = TypeVar("T")

_num_joins = 0


@contextlib.contextmanager
def joined(
    out: str, *, facts: Callable[[], Mapping[str, str]], room: Callable[[], str], allow: Collection[str] = ()
) -> Iterator[tuple[World, list[Changed]]]:
    """All ranks of a run in one process group, the folder `out` theirs inside the block; and what they differ in and may.

    Args:
        facts: what must be the same on all ranks, by name (`host_differences.KINDS`); a process that is alone is not asked.
        room: why there is too little room for the run, or nothing.
        allow: kinds of differences that are reported and not refused.
    Raises:
        UserError: on all ranks, with a table of what differs. Nothing is left of the start.
    """
    here = place()
    with contextlib.ExitStack() as stack:
        if here.size == 1:
            notes = {"disk": text} if (text := room()) else {}
            if notes and "disk" not in allow:
                raise UserError(text)
            stack.enter_context(hold(out, "run", processes=[this_process(launched=TORCHRUN in os.environ)]))
        else:
            global _num_joins
            _num_joins += 1
            store = dist.PrefixStore(f"normfree-join/{_num_joins}", distributed.meeting_point())
            notes = Meeting(store, here, out, facts=facts, room=room, allow=allow).agree(stack)
        said = {f"{what} of hosts": text for what, text in notes.items()}
        yield distributed.join(), [Changed(step=0, what=what, text=f"{what}: {text}") for what, text in said.items()]


class Meeting:
    """One start of a run, on this rank. Arguments as of `joined`."""

    def __init__(
        self,
        store: dist.Store,
        here: Place,
        out: str,
        *,
        facts: Callable[[], Mapping[str, str]],
        room: Callable[[], str],
        allow: Collection[str],
    ) -> None:
        self._store, self._here, self._out = store, here, out
        self._make_facts, self._room, self._allow = facts, room, allow
        self._notes: dict[str, str] = {}
        self._mine = this_process(launched=True)
        self._clock = time.time

    def agree(self, stack: contextlib.ExitStack) -> dict[str, str]:
        """What differs and may. On the main rank `stack` then owns the folder."""
        owned = self._main_owns(stack) if self._here.is_main else self._answer()
        clock_s = self._clock()
        if owned.refused:
            self._raise(owned.refused, owned.table)
        seen = self._look(owned, clock_s)
        verdict = self._main_judges(seen) if self._here.is_main else self._hear_verdict(seen)
        if verdict.refused:
            self._raise(verdict.refused, verdict.table)
        return verdict.notes

    # --- what the hosts are made of -----------------------------------------------------------------------------------

    def _main_owns(self, stack: contextlib.ExitStack) -> Owned:
        opening = self._open()
        self._say("main", opening)
        if opening.error:
            return Owned(refused=opening.error)
        answers = {0: Answer(host=opening.host, process=self._mine, loopback=self._loopback())}
        answers |= self._hear_all("answer", Answer)
        owned = self._judge(opening, answers)
        if not owned.refused:
            processes = [a.process for a in answers.values() if a.process is not None]
            try:
                token = stack.enter_context(hold(self._out, "run", processes=processes)).token
                elsewhere = len(processes) < self._here.size
                owned = Owned(token=token, is_elsewhere=elsewhere)
            except UserError as error:
                owned = Owned(refused=str(error))
        owned = dataclasses.replace(owned, clock_s=self._clock())
        self._say("owned", owned)
        return owned

    def _open(self) -> Opening:
        facts, error = self._try(self._make_facts, NOTHING)
        room, no_room = self._try(self._room, "")
        if room and "disk" in self._allow:
            self._notes = {"disk": room}
        error = error or no_room or ("" if "disk" in self._allow else room)
        return Opening(host=self._mine.host, machine=self._mine.machine, facts=dict(facts), error=error)

    def _try(self, work: Callable[[], T], otherwise: T) -> tuple[T, str]:
        """What it gives, or what the user has to mend."""
        try:
            return work(), ""
        except UserError as error:
            return otherwise, str(error)

    def _answer(self) -> Owned:
        opening = self._hear("main", Opening)
        if opening.error:
            return Owned(refused=opening.error)
        facts, error = self._try(self._make_facts, NOTHING)
        names = [*opening.facts, *(name for name in facts if name not in opening.facts)]
        differ = [name for name in names if opening.facts.get(name) != facts.get(name)]
        is_here = opening.machine == self._mine.machine
        answer = Answer(
            host=self._mine.host,
            process=self._mine if is_here else None,
            differences={name: facts.get(name, "none") for name in ([] if error else differ)[:MAX_DIFFERENCES]},
            loopback=self._loopback(),
            error=error,
        )
        self._say(f"answer/{self._here.rank}", answer)
        return self._hear("owned", Owned)

    def _judge(self, opening: Opening, answers: dict[int, Answer]) -> Owned:
        for rank, answer in answers.items():
            if answer.error:
                return Owned(refused=f"{answer.error} (found by rank {rank} on {answer.host})")
        differences = host_differences.of_facts(
            opening.facts, {rank: (answer.host, answer.differences) for rank, answer in answers.items()}
        )
        if any(answer.process is None for answer in answers.values()):
            differences += host_differences.own_names({rank: (a.host, a.loopback) for rank, a in answers.items()})
        refused, self._notes = host_differences.divide(differences, self._allow, self._notes)
        return (
            Owned(refused=host_differences.sentence(refused), table=host_differences.table(refused))
            if refused
            else Owned()
        )

    def _loopback(self) -> str:
        """gloo meets under the host's name; with NCCL and where an interface is named, it does not."""
        if os.environ.get("GLOO_SOCKET_IFNAME") or not distributed.uses_gloo():
            return ""
        with contextlib.suppress(OSError, ValueError):
            address = socket.gethostbyname(socket.gethostname())
            return address if ipaddress.ip_address(address).is_loopback else ""
        return ""

    # --- the run folder, and clocks -----------------------------------------------------------------------------------

    def _look(self, owned: Owned, clock_s: float) -> Seen:
        reason = _why_not_seen(Holder(self._out, owned.token), SEEN_S if owned.is_elsewhere else 0.0)
        ahead_s = clock_s - owned.clock_s
        return Seen(host=self._mine.host, out=_place(self._out), reason=reason[:MAX_TEXT], ahead_s=ahead_s)

    def _main_judges(self, mine: Seen) -> Verdict:
        seen = {0: mine} | self._hear_all("seen", Seen)
        differences = host_differences.folders({rank: (s.host, s.out, s.reason) for rank, s in seen.items()})
        differences += host_differences.clocks(
            {rank: (s.host, s.ahead_s) for rank, s in seen.items()}, reported_s=CLOCK_S, refused_s=CLOCK_LIMIT_S
        )
        refused, notes = host_differences.divide(differences, self._allow, self._notes)
        verdict = Verdict(notes=notes)
        if refused:
            verdict = Verdict(refused=host_differences.sentence(refused), table=host_differences.table(refused))
        self._say("verdict", verdict)
        return verdict

    def _hear_verdict(self, seen: Seen) -> Verdict:
        self._say(f"seen/{self._here.rank}", seen)
        return self._hear("verdict", Verdict)

    # --- the store ----------------------------------------------------------------------------------------------------

    def _say(self, key: str, document: Any) -> None:
        self._store.set(key, json.dumps(dataclasses.asdict(document)))

    def _hear(self, key: str, kind: type[T]) -> T:
        return read(self._store.get(key), kind, "the main rank")

    def _hear_all(self, what: str, kind: type[T]) -> dict[int, T]:
        """Of all ranks but the main one."""
        ranks = range(1, self._here.size)
        keys = [f"{what}/{rank}" for rank in ranks]
        try:
            self._store.wait(keys, distributed.COLLECTIVE_TIMEOUT)
        except dist.DistStoreError:
            missing = [str(rank) for rank, key in zip(ranks, keys, strict=True) if not self._store.check([key])]
            raise RuntimeError(
                f"ranks {', '.join(missing[:20])} did not join within {distributed.COLLECTIVE_TIMEOUT}"
            ) from None
        found = self._store.multi_get(keys)
        return {rank: read(data, kind, f"rank {rank}") for rank, data in zip(ranks, found, strict=True)}

    def _raise(self, refused: str, table: Sequence[str]) -> None:
        """On all ranks. The store may be the main rank's own: it stays until all have read why they are refused."""
        num_heard = self._store.add("heard", 0 if self._here.is_main else 1)
        deadline_s = time.monotonic() + HEARD_S
        while self._here.is_main and num_heard < self._here.size - 1 and time.monotonic() < deadline_s:
            time.sleep(0.02)
            num_heard = self._store.add("heard", 0)
        error = UserError(refused)
        error.table = table
        raise error


def _place(out: str) -> str:
    return str(objects.local_path(out).absolute()) if objects.is_local(out) else out


def _why_not_seen(holder: Holder, patience_s: float) -> str:
    deadline_s = time.monotonic() + patience_s
    while True:
        reason = "it is not there"
        try:
            if holder.is_seen():
                return ""
            if objects.is_local(holder.url):
                os.listdir(objects.local_path(holder.url))  # network disks look again then
        except Exception as error:  # clients of stores raise what they like
            reason = f"{type(error).__name__}: {error}"
        if time.monotonic() > deadline_s:
            return reason
        time.sleep(0.5)
