"""Objects of other processes are data: none runs, and those that ranks exchange come as they were sent."""

import base64
import dataclasses
import datetime
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousStateError

from orchestration.launch import elastic
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.exchange import objects
from tests.fuzzing import fuzz, mutants

ROOT = Path(__file__).parents[3]


class Hostile:
    """Its pickle makes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._file),)


def programs(marker: Path) -> dict[str, bytes]:
    name = str(marker).encode()
    return {
        "function": pickle.dumps(Hostile(marker)),
        "held by what is admitted": pickle.dumps([Duration(3, "steps"), {"a": Hostile(marker)}]),
        "by its old name": b"cposix\nmkdir\n(V" + name + b"\ntR.",
        "attribute of a module of ours": b"cpipeline.storage.objects\nremove\n(V" + name + b"\ntR.",
        "name with dots": b"\x80\x04\x8c\x11pipeline.duration\x8c\x14Duration.__init__.x.\x93.",
        "instance": b"(V" + name + b"\niposix\nmkdir\n.",
        "persistent": b"Pabc\n.",
        "cut short": pickle.dumps([1, 2, 3])[:-3],
        "array of objects": pickle.dumps(np.array([Hostile(marker)], dtype=object)),
        "number of objects": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(VO\ntRV" + name + b"\ntR.",
    }


@pytest.mark.parametrize("kind", programs(Path("/")))
def test_a_hostile_object_runs_nothing_and_ends_in_one_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data of this run") as refused:
        objects.loads(programs(tmp_path / "ran")[kind])
    assert not (tmp_path / "ran").exists() and "\n" not in str(refused.value)


@dataclasses.dataclass
class Foreign:
    """Of no package of ours."""


def test_what_ranks_exchange_comes_as_it_was_sent() -> None:
    plain = [
        None,
        True,
        -3,
        2**70,
        2.5,
        "x",
        b"y",
        (1, ("a",)),
        {"a": [1]},
        {1, 2},
        frozenset("a"),
        datetime.timedelta(3),
    ]
    arrays = [np.arange(5), np.zeros((0,)), np.array(["a", "bc"]), np.asfortranarray(np.ones((2, 3))), np.float32(2)]
    for value in [*plain, *arrays, Duration(3, "steps"), UserError("why")]:
        for protocol in (4, 5):
            found = objects.loads(pickle.dumps(value, protocol))
            assert type(found) is type(value) and repr(found) == repr(value)
    with pytest.raises(UserError, match="Foreign"):
        objects.loads(pickle.dumps(Foreign()))


def test_the_collectives_of_a_run_unpickle_nothing_else(tmp_path: Path) -> None:
    code = f"""
import os, torch.distributed as dist
from pipeline import distributed
from pipeline.errors import UserError
class Hostile:
    def __reduce__(self): return os.mkdir, ({str(tmp_path / "ran")!r},)
distributed.join()
for call in (lambda: dist.all_gather_object([None], Hostile()), lambda: dist.scatter_object_list([None], [Hostile()])):
    try: call()
    except UserError as error: print(error)
distributed.leave()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("'posix.mkdir'") == 2 and not (tmp_path / "ran").exists()


def test_a_hostile_state_in_the_jobs_store_runs_nothing_in_an_agent(tmp_path: Path) -> None:
    store = HashStore()
    handler = elastic.rendezvous(store, run_id="j", min_hosts=1, max_hosts=1, own_address="127.0.0.1", join_s=5)
    for state in (Hostile(tmp_path / "ran"), {"no": "state"}):
        store.set("torch.rendezvous.j", base64.b64encode(pickle.dumps(state)).decode())
        with pytest.raises(RendezvousStateError, match="another process has come between"):
            handler.next_rendezvous()
    assert not (tmp_path / "ran").exists()


def test_agents_meet_in_a_store(tmp_path: Path) -> None:
    handler = elastic.rendezvous(HashStore(), run_id="j", min_hosts=1, max_hosts=1, own_address="127.0.0.1", join_s=30)
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size) == (0, 1)
    handler.shutdown()


@pytest.mark.parametrize("num", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutant_of_an_object_does_more_than_be_refused(num: int, tmp_path: Path) -> None:
    values = [{"a": [1, (2.5, "x")], "b": np.arange(6).reshape(2, 3)}, Duration(3, "steps"), UserError("why"), {1, 2}]
    tokens = [b"cposix\nsystem\n", b"\x93", b"R.", b"\x81", b"b.", b"pipeline.errors", b"builtins", b"eval"]
    counts = fuzz(objects.loads, mutants([pickle.dumps(value) for value in values], num, tokens=tokens), tmp_path)
    assert counts["read"] and counts["refused"]
