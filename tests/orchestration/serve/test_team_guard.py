"""The team's guard: places of files, log-ins, names of the server, certificates."""

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

import pytest

from orchestration.serve import addresses
from orchestration.serve.team_guard import FAILURES, FAILURES_OF_ADDRESS, WINDOW_S, LoginLimit, is_within
from orchestration.serve.team_server import _tls
from pipeline.errors import UserError

BUCKET = "s3://bucket/mlflow"


@pytest.mark.parametrize(
    "location",
    [
        *(
            "file:///etc",
            "/etc",
            "etc",
            "",
            "file://bucket/mlflow",
            "gs://bucket/mlflow",
            "s3://bucket",
            "s3://other/mlflow",
        ),
        *("s3://bucket/mlflow2", "s3://bucket/mlflow/../x", "s3://bucket/mlflow/%2e%2e/x", "s3://bucket/mlflow\\..\\x"),
        *("s3://bucket/mlflow?endpoint=x", "s3://bucket/mlflow/a#b", "S3://bucket/mlflow/../..", "http://evil/x"),
        *(
            "mlflow-artifacts://evil/x",
            "mlflow-artifacts:x",
            "mlflow-artifacts:/../x",
            "mlflow-artifacts:///x",
            "runs:/1/x",
        ),
    ],
)
def test_places_outside_the_bucket(location: str) -> None:
    assert not is_within(location, BUCKET)


@pytest.mark.parametrize(
    "location", [BUCKET, f"{BUCKET}/", f"{BUCKET}/7/a..b/artifacts", "mlflow-artifacts:/7/run/artifacts"]
)
def test_places_in_the_bucket(location: str) -> None:
    assert is_within(location, BUCKET) and is_within(location, f"{BUCKET}/")


class Client:
    """Asks a LoginLimit over an application that lets in whoever has the password "right"."""

    def __init__(self, **options: Any) -> None:
        self.now, self.seen = 0.0, 0
        self.limit = LoginLimit(self._app, clock=lambda: self.now, **options)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen += 1
        await asyncio.sleep(0)
        right = any(base64.b64decode(v[6:]).endswith(b":right") for _, v in scope["headers"])
        await send({"type": "http.response.start", "status": 200 if right else 401, "headers": []})

    async def ask(self, user: str | None, password: str = "wrong", host: str = "203.0.113.5", path: str = "/") -> int:
        scope: dict[str, Any] = {"type": "http", "path": path, "client": (host, 1), "headers": []}
        if user is not None:
            scope["headers"] = [(b"Authorization", b"Basic " + base64.b64encode(f"{user}:{password}".encode()))]
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await self.limit(scope, None, send)
        return int(sent[0]["status"])

    def __call__(self, *arguments: Any, **options: Any) -> int:
        return asyncio.run(self.ask(*arguments, **options))


def test_failed_logins_are_counted_by_user_and_address() -> None:
    ask = Client()
    assert [ask("ada") for _ in range(FAILURES)] == [401] * FAILURES
    assert ask("ada") == ask("ada", "right") == 429
    assert ask("bob", "right") == 200 and ask("ada", "right", host="203.0.113.6") == 200
    ask.now = WINDOW_S + 1
    assert ask("ada", "right") == 200


def test_many_users_from_one_network_are_one_guesser() -> None:
    ask = Client()
    assert {ask(f"u{i}", host=f"2001:db8::{i:x}") for i in range(FAILURES_OF_ADDRESS)} == {401}
    assert ask("new", "right", host="2001:db8::ffff:1") == 429 and ask("new", "right", host="2001:db8:0:1::1") == 200


def test_who_has_no_password_yet_is_only_asked_for_it() -> None:
    ask = Client()
    assert {ask(None) for _ in range(2 * FAILURES_OF_ADDRESS)} == {401} and ask("ada", "right") == 200


def test_tries_at_once_and_several_processes_learn_no_more() -> None:
    async def at_once(ask: Client) -> list[int]:
        return await asyncio.gather(*(ask.ask("ada", "right" if i == 30 else "wrong") for i in range(60)))

    ask = Client(num_processes=4)
    answers = asyncio.run(at_once(ask))
    assert answers.count(401) == FAILURES // 4 and answers.count(429) == 60 - FAILURES // 4


def test_the_assistant_that_runs_commands_is_not_reached() -> None:
    ask = Client()
    assert ask("admin", "right", path="/ajax-api/3.0/mlflow/assistant/message") == 403 and not ask.seen


def test_a_server_on_all_interfaces_has_an_address_that_can_be_called_and_names_for_its_pages() -> None:
    assert addresses.reachable("0.0.0.0") != "0.0.0.0" and addresses.reachable("127.0.0.1") == "127.0.0.1"
    assert {"localhost", "127.0.0.1", addresses.reachable("0.0.0.0")} <= set(addresses.names("0.0.0.0"))
    hosts, pages = addresses.allowed("http", ["192.0.2.2"], 5602, ["mlflow.example"])
    assert {"192.0.2.2", "192.0.2.2:*", "mlflow.example"} <= set(hosts)
    assert {"http://192.0.2.2:5602", "https://mlflow.example"} <= set(pages) and "http://192.0.2.2" not in pages
    assert addresses.is_loopback("127.0.0.1") and not addresses.is_loopback("0.0.0.0")


def make_certificate(folder: Path, host: str) -> tuple[str, str]:
    """A certificate that signs itself, and its key, as PEM files."""
    x509 = pytest.importorskip("cryptography.x509")
    import datetime
    import ipaddress

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=24))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "server.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    (folder / "server.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return str(folder / "server.pem"), str(folder / "server.key")


def test_certificates_are_tried_before_anything_starts(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "127.0.0.1")
    assert sorted(_tls(certificate, key).values()) == sorted([certificate, key]) and _tls(None, None) == {}
    for wrong in ((certificate, None), (key, certificate), (str(tmp_path / "none"), key), (None, key)):
        with pytest.raises(UserError, match="--certificate"):
            _tls(*wrong)
