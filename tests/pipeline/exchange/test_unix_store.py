"""The store of the ranks of one machine answers as torch's does, and no other user."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch.distributed as dist

from orchestration import child_process
from pipeline.exchange import unix_store


@pytest.fixture(params=["torch's", "ours"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dist.Store]:
    if request.param == "ours":
        server = unix_store.Server(tmp_path)
        yield unix_store.UnixStore(str(tmp_path))
        server.close()
    else:
        yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_the_methods_that_ranks_use_give_what_those_of_torchs_store_give(store: dist.Store) -> None:
    own = dist.PrefixStore("of one attempt", store)
    own.set("a", "1")
    assert own.get("a") == store.get("of one attempt/a") == b"1"
    assert [own.add("n", number) for number in (0, 2, -1)] == [0, 2, 1]
    assert own.check(["a", "n"]) and not own.check(["a", "b"])
    assert own.multi_get(["n", "a"]) == [b"1", b"1"]
    assert own.compare_set("v", "", "first") == own.compare_set("v", "", "second") == b"first"
    own.set("ü", "\x00ÿ")
    assert own.get("ü").decode() == "\x00ÿ"
    with pytest.raises(dist.DistStoreError):
        own.wait(["never"], timedelta(seconds=0.05))


def test_a_key_that_is_waited_for_comes_from_another_connection(tmp_path: Path) -> None:
    server = unix_store.Server(tmp_path)
    found: list[bytes] = []
    waits = threading.Thread(target=lambda: found.append(unix_store.UnixStore(str(tmp_path)).get("late")))
    waits.start()
    unix_store.UnixStore(str(tmp_path)).set("late", b"\xff")
    waits.join(30)
    server.close()
    assert found == [b"\xff"]


def test_a_store_whose_process_has_ended_is_an_error_of_stores(tmp_path: Path) -> None:
    with Listener(str(tmp_path / unix_store.SOCKET), "AF_UNIX") as listener:
        store = unix_store.UnixStore(str(tmp_path))
        listener.accept().close()
    for call in (lambda: store.get("a"), lambda: unix_store.UnixStore(str(tmp_path)).get("a")):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_no_other_user_reaches_it() -> None:
    with child_process.rank_variables(2) as variables:
        path = f"{variables[unix_store.FOLDER]}/{unix_store.SOCKET}"
        code = "import os, socket, sys\nif sys.argv[2:]: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        code += "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        words = [sys.executable, "-I", "-c", code, path]
        assert subprocess.run(words, cwd="/", check=False).returncode == 0
        refused = subprocess.run([*words, "nobody"], cwd="/", capture_output=True, text=True, check=False)
        assert "PermissionError" in refused.stderr
