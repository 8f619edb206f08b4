"""Ranks that are started again under one store hear each other, and nothing of those before."""

import pytest
from torch.distributed import HashStore

from pipeline.supervision.attempt_store import AttemptStore


def test_all_ranks_follow_the_name_that_rank_0_gives_whatever_their_agents_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = HashStore()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    main = AttemptStore(whole, "w", rank=0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # that of a host that came back
    other = AttemptStore(whole, "w", rank=1)
    assert main.is_new() and other.is_new() and not other.is_new()
    assert main.store is not None and other.store is not None
    main.store.set("beat", "1")
    assert other.store.get("beat") == b"1"


def test_nothing_is_taken_from_the_attempt_before_and_the_new_name_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    whole = HashStore()
    before = AttemptStore(whole, "w", rank=0)
    before.is_new()
    assert before.store is not None
    before.store.set("claims", "1")
    other = AttemptStore(whole, "w", rank=1)
    assert other.is_new() and not other.is_sure  # it may be the last one's
    AttemptStore(whole, "w", rank=0)
    assert other.is_new() and other.store is not None and not other.store.check(["claims"])


def test_before_rank_0_there_is_no_attempt() -> None:
    store = AttemptStore(HashStore(), "w", rank=1)
    assert not store.is_new() and store.store is None
