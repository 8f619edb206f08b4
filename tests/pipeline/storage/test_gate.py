"""How many requests are under way: as many as bring more, fewer where a store asks for patience. By a clock of the test's."""

import threading

import pytest

from pipeline.storage import clients, range_reads
from pipeline.storage.range_reads import Gate


class Clock:
    now_s = 100.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(range_reads, "time", found)
    return found


def rounds(gate, clock, num, *, fast, is_short=True):
    """Of a store that serves so many requests at a time, each a megabyte in a second; the limits that were tried."""
    tried = []
    for _ in range(num):
        tried.append(gate.limit)
        gate._is_short = is_short
        asked = 2 * gate.limit
        for place in range(asked):
            clock.now_s += 1 / min(gate.limit, fast)
            gate.brought(1 << 20)
            gate._is_short |= is_short and place < asked - 1
    return tried


def test_more_requests_for_as_long_as_they_bring_more(clock):
    gate = Gate(8, 32)
    rounds(gate, clock, 30, fast=20)
    assert 18 <= gate.limit <= 27
    latency = Gate(8, 32)
    rounds(latency, clock, 10, fast=1000)
    assert latency.limit == 32
    full = Gate(8, 32)
    assert rounds(full, clock, 20, fast=8).count(8) >= 17  # another number is tried once, and then after a while
    idle = Gate(8, 32)
    rounds(idle, clock, 10, fast=1000, is_short=False)
    assert idle.limit == 8  # nobody waits for more


def test_a_store_that_asks_for_patience_gets_half_and_a_pause_and_is_counted(clock):
    gate = Gate(8, 32)
    for _ in range(8):
        gate.overloaded(99.0)  # all eight were under way together
    assert gate.limit == 4 and gate.num_overloads == 8 and gate.notice.endswith("so far: 1")
    assert clients.FIRST_WAIT_S / 2 <= gate._open_at_s - clock.now_s <= clients.FIRST_WAIT_S
    for number in range(10):
        clock.now_s += 10
        gate.overloaded(clock.now_s)
        assert gate._open_at_s - clock.now_s <= min(clients.FIRST_WAIT_S * 2 ** (number + 1), range_reads.MAX_WAIT_S)
    assert gate.limit == 1 and gate.notice.endswith("so far: 10")
    rounds(gate, clock, 40, fast=1000)
    assert gate.limit > 8  # it is not held against the store for ever


def test_never_more_under_way_than_the_limit():
    gate, most, under_way, lock = Gate(3, 3), 0, 0, threading.Lock()

    def work():
        nonlocal most, under_way
        for _ in range(200):
            with gate.request():
                with lock:
                    under_way += 1
                    most = max(most, under_way)
                with lock:
                    under_way -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert 1 <= most <= 3 and gate._under_way == 0
