"""Another user of the machine who has connected to a port of this process is seen and refused."""

import os
import socket
import subprocess
import sys

import pytest

from pipeline.errors import UserError
from pipeline.exchange.local_connections import refuse_strangers, sockets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
CONNECT = """
import encodings.idna, os, socket, sys
if sys.argv[2] == "nobody": os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))): print(flush=True); sys.stdin.read()
"""


@pytest.mark.parametrize("user", ["own", "nobody"])
def test_a_connection_of_another_user_is_refused_and_ones_own_is_not(user: str) -> None:
    if user == "nobody" and os.getuid() != 0:
        pytest.skip("only root can be another user")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = [sys.executable, "-I", "-c", CONNECT, str(listener.getsockname()[1]), user]
        with subprocess.Popen(words, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdout and client.stdout.readline()
            if user == "nobody":
                with pytest.raises(UserError, match="user 65534 of this machine"):
                    refuse_strangers(2)
                refuse_strangers(1)
            else:
                refuse_strangers(2)
            client.communicate(b"")
    refuse_strangers(2)


@pytest.mark.skipif(os.getuid() != 0, reason="the superuser's connections are made by root alone")
def test_a_connection_of_the_superuser_is_no_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        places = [listener.getsockname()]
        assert any(found.user == 0 and (str(found.remote[0]), found.remote[1]) in places for found in sockets())
        monkeypatch.setattr(os, "getuid", lambda: 65534)
        refuse_strangers(2)  # of whom it sees, root alone is not this user
