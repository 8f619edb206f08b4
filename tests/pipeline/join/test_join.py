"""All ranks agree before step 0, or none starts: each planted difference is found and named, and leaves nothing."""

import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.join import agreement
from pipeline.join.agreement import Meeting
from pipeline.join.host_differences import KINDS, table
from pipeline.storage import ownership
from pipeline.supervision.rank_environment import Place

SAME = {
    "code": "c0de",
    "revision": "aaaa",
    "library torch": "2.15.0",
    "devices": "8 x H100",
    "data": "da7a",
    "field seed": "0",
}


@dataclass
class Rank:
    """What a rank finds on its host."""

    host: str = "h0"
    facts: Callable[[], Mapping[str, str]] = lambda: SAME
    out: str = ""
    room: str = ""
    ahead_s: float = 0.0
    loopback: str = ""
    allow: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)


def meet(ranks: list[Rank], out: Path, monkeypatch: pytest.MonkeyPatch) -> list[UserError | None]:
    """Each rank as a thread, host by host a machine; what each raises."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    monkeypatch.setattr(agreement, "SEEN_S", 0.1)

    def one(number: int) -> UserError | None:
        rank = ranks[number]
        here = Place(rank=number, size=len(ranks), local_rank=0)
        mine = Meeting(store, here, rank.out or str(out), facts=rank.facts, room=lambda: rank.room, allow=rank.allow)
        is_first = rank.host == ranks[0].host
        mine._mine = replace(mine._mine, host=rank.host, machine=mine._mine.machine if is_first else rank.host)
        mine._clock = lambda: 1e9 + rank.ahead_s
        mine._loopback = lambda: rank.loopback  # type: ignore[method-assign]
        try:
            with contextlib.ExitStack() as stack:
                rank.notes = mine.agree(stack)
                assert number or (out / ownership.NAME).exists()
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, range(len(ranks))))


def other(**facts: str) -> Callable[[], dict[str, str]]:
    return lambda: SAME | {name.replace("_", " "): value for name, value in facts.items()}


@pytest.mark.parametrize(
    "planted, words",
    [
        (Rank("h1", other(library_torch="2.14.1")), ("library torch", "2.15.0 on h0 (rank 0)", "2.14.1 on h1", "libraries")),
        (Rank("h1", other(code="beef", revision="bbbb")), ("code", "c0de", "beef on h1", "--join.allow code")),
        (Rank("h1", other(field_seed="3")), ("field seed", "0 on h0", "3 on h1 (rank 1)", "same command")),
        (Rank("h1", other(data="5eed")), ("data", "da7a", "5eed on h1", "copy the dataset again")),
        (Rank("h1", other(devices="7 x H100")), ("devices", "8 x H100 on h0", "7 x H100 on h1", "--join.allow devices")),
        (Rank("h1", ahead_s=-400), ("clock", "400 s behind on h1 (rank 1)", "chrony")),
        (Rank("h1", loopback="127.0.1.1"), ("h1 (rank 1)", "127.0.1.1", "GLOO_SOCKET_IFNAME")),
        (Rank("h1", out="/nowhere/run"), ("rank 1 on h1 does not find in /nowhere/run", "h0", "--out")),
    ],
)  # fmt: skip
def test_a_difference_refuses_the_run_on_all_ranks_by_host_and_value_and_leaves_nothing(
    planted: Rank, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = meet([Rank(), planted], tmp_path / "run", monkeypatch)
    assert first is not None and second is not None and str(first) == str(second)
    assert all(word in str(first) for word in words), str(first)
    assert list(first.table) == list(second.table) and any("h1 (rank 1)" in line for line in first.table)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_agree_own_the_folder_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(f"h{number // 4}") for number in range(16)]
    assert meet(ranks, tmp_path / "run", monkeypatch) == [None] * 16
    assert all(rank.notes == {} for rank in ranks)


@pytest.mark.parametrize(
    "planted, allow, kind",
    [
        (other(code="beef"), "code", "code"),
        (other(library_torch="2.14"), "libraries", "library torch"),
        (other(devices="7 x H100"), "devices", "devices"),
        (other(revision="bbbb"), "", "revision"),
    ],
)
def test_what_is_allowed_is_reported_on_all_ranks(
    planted: Callable[[], Mapping[str, str]], allow: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [Rank(allow=(allow,)), Rank("h1", planted, allow=(allow,))]
    assert meet(ranks, tmp_path / "run", monkeypatch) == [None, None]
    assert all(kind in rank.notes and "h1 (rank 1)" in rank.notes[kind] for rank in ranks)


@pytest.mark.parametrize("ahead_s, is_reported", [(3, False), (-20, True)])
def test_a_clock_that_is_a_little_off_is_reported(
    ahead_s: float, is_reported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [Rank(), Rank("h1", ahead_s=ahead_s)]
    assert meet(ranks, tmp_path / "run", monkeypatch) == [None, None]
    assert ("clock" in ranks[0].notes) == is_reported


def test_a_disk_without_room_for_a_checkpoint_refuses_the_run_unless_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = "/disk has 1 GB free, and a checkpoint of this run takes 3 GB"
    assert [str(error) for error in meet([Rank(room=room), Rank("h1")], tmp_path / "run", monkeypatch)] == [room, room]
    ranks = [Rank(room=room, allow=("disk",)), Rank("h1")]
    assert meet(ranks, tmp_path / "run", monkeypatch) == [None, None] and ranks[1].notes == {"disk": room}


def test_what_one_rank_cannot_find_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dict[str, str]:
        raise UserError("there is no dataset at /data")

    for ranks, end in (
        ([Rank(), Rank("h1", missing)], " (found by rank 1 on h1)"),
        ([Rank("h0", missing), Rank()], ""),
    ):
        found = meet(ranks, tmp_path / "run", monkeypatch)
        assert [str(error) for error in found] == [f"there is no dataset at /data{end}"] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_refuses_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_process = ownership.this_process()
    monkeypatch.setattr(ownership, "_is_mine", lambda owner: False)
    with ownership.hold(str(tmp_path / "run"), "run", processes=[other_process]):
        found = meet([Rank(), Rank("h1")], tmp_path / "run", monkeypatch)
    assert all(error is not None and "is in use" in str(error) for error in found)


def test_many_hosts_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(f"h{n // 8}", other(library_torch="2.14") if n >= 24 else lambda: SAME) for n in range(64)]
    found = meet(ranks, tmp_path / "run", monkeypatch)
    assert found[0] is not None and len({str(error) for error in found}) == 1
    assert [line.split("  ")[-1] for line in found[0].table[1:]] == [
        "h0 (ranks 0-7), h1 (ranks 8-15), h2 (ranks 16-23)",
        "h3 (ranks 24-31), h4 (ranks 32-39), h5 (ranks 40-47) and 2 hosts more",
    ]


class Counted:
    """A store that counts the bytes that one rank sends and reads."""

    def __init__(self, inner: dist.Store) -> None:
        self.inner, self.num_bytes, self.num_calls = inner, 0, 0

    def set(self, key: str, value: str) -> None:
        self.num_bytes, self.num_calls = self.num_bytes + len(value), self.num_calls + 1
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self.inner.get(key)
        self.num_bytes, self.num_calls = self.num_bytes + len(value), self.num_calls + 1
        return value


def test_what_a_rank_sends_and_reads_does_not_grow_with_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank and the main one of 4,096, whose other ranks' answers lie ready."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spent: dict[int, tuple[int, int]] = {}
    for size in (2, 4096):
        store, begin_s = dist.HashStore(), time.monotonic()
        answer, seen = '{"host": "h%d"}', '{"host": "h%d", "out": "/run", "reason": "", "ahead_s": 0.0}'
        for rank in range(2, size):
            store.set(f"answer/{rank}", answer % (rank // 8))
            store.set(f"seen/{rank}", seen % (rank // 8))
        one = Counted(store)
        named = {"facts": lambda: SAME, "room": lambda: "", "allow": ()}
        main = Meeting(store, Place(rank=0, size=size), str(tmp_path / str(size)), **named)
        rank_1 = Meeting(one, Place(rank=1, size=size, local_rank=1), str(tmp_path / str(size)), **named)  # type: ignore[arg-type]
        with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
            first, second = pool.submit(main.agree, stack), pool.submit(rank_1.agree, contextlib.ExitStack())
            assert first.result() == second.result() == {}
        spent[size] = one.num_bytes, one.num_calls
        assert time.monotonic() - begin_s < 30
    assert abs(spent[4096][0] - spent[2][0]) < 64 and spent[4096][1] == spent[2][1] == 5


def test_every_kind_of_difference_has_a_remedy_and_the_table_is_bounded() -> None:
    from pipeline.join.host_differences import of_facts

    answers = {r: (f"h{r}", {"library torch": f"2.{r}"} if r else {}) for r in range(100)}
    lines = table(of_facts({"library torch": "2.15"}, answers))
    assert len(lines) == 42 and lines[-1] == "... 59 lines more"
    assert all(remedy for _, remedy in KINDS.values())
