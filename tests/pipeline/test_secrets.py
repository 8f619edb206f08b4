"""What a secret in a URL is follows from its place: whatever it looks like, it is refused and does not show."""

import random
import string
import urllib.parse

import pytest

from pipeline.errors import UserError
from pipeline.secrets import has_secret, public, refuse_secrets, refuse_secrets_of_a_tracker

CORE = "hunter2Mark"
SCHEMES = (
    "postgresql",
    "mysql+pymysql",
    "mssql+pyodbc",
    "s3",
    "s3a",
    "gs",
    "http",
    "https",
    "redis",
    "snowflake",
    "new+scheme",
)
KEYS = (
    "password",
    "pwd",
    "pass",
    "auth",
    "token",
    "access_token",
    "X-Amz-Signature",
    "sig",
    "key",
    "apikey",
    "api_key",
    "APIKey",
)
KEYS += (
    "AWSAccessKeyId",
    "client_secret",
    "Signature",
    "sasl.password",
    "sslpassword",
    "PWD",
    "credential",
    "pass%77ord",
)


def planted(draw: random.Random) -> str:
    """A URL with the core in a password, in a key's value, or in a quoted connection string."""
    scheme, key = draw.choice(SCHEMES), draw.choice(KEYS)
    kind = draw.randrange(4)
    if kind == 0:
        odd = "".join(draw.choices(string.ascii_letters + "/'\" ?#@!$%&=+;,", k=draw.randrange(6)))
        return f"{scheme}://{draw.choice(('ada', '', 'a.b'))}:x{odd}{CORE}{odd}@host/db?a=1"
    if kind == 1:
        return f"{scheme}://host/x{draw.choice('?#')}{draw.choice(('', 'a=1&', 'b=2;'))}{key}={CORE}"
    if kind == 2:
        return f"{scheme}:///?odbc_connect={urllib.parse.quote(f'DRIVER={{X}};UID=ada; PWD = {CORE}', safe='')}"
    return f"{scheme}://host/?next={urllib.parse.quote(f'https://ada:{CORE}@host/x', safe='')}"


def test_no_planted_secret_passes_or_shows() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        url = planted(draw)
        text = draw.choice(("", "cannot reach ", "simplecache::", "('")) + url
        assert has_secret(text), text
        assert CORE not in public(text), text
        assert not has_secret(public(text)), (text, public(text))
        with pytest.raises(UserError, match="credentials") as error:
            refuse_secrets({"a": [text]}, "it")
        assert CORE not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/x@y", "abfs://container@account/x", "ssh://ada@host/x", "https://h/x?monkey=1&author=me", "a:b@c",
        "C:/x@y", "postgresql://mlflow@db/mlflow", "https://host:8443/x@2x.tar", "hf://datasets/org/name@rev/f", "data/a@b",
        "sqlite:////tmp/a b@c/mlflow.db", "https://h/x?token=", "http://[::1]:5000/", "hdfs://namenode:8020/user@x",
    ],
)  # fmt: skip
def test_what_holds_no_secret_is_taken_as_it_is(text: str) -> None:
    assert not has_secret(text)
    refuse_secrets(text, "it")


def test_a_trackers_address_with_anybody_in_it_is_refused() -> None:
    for uri in ("http://ada:12/3@host", "https://token@host", "http://host:5000/?key=x", "mysql://a:b@h"):
        with pytest.raises(UserError, match="credentials"):
            refuse_secrets_of_a_tracker(uri)


def test_text_made_to_take_long_does_not() -> None:
    nested = "x"
    for _ in range(12):
        nested = "http://h?a=" + urllib.parse.quote(nested, safe="")
    texts = [
        nested,
        "http://" * 5000,
        "http://h?" + "a=&" * 20000,
        "http://h?a=" + "&b" * 20000,
        "http://" + ":" * 50000,
    ]
    for text in texts:
        assert isinstance(public(text), str)
