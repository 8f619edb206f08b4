"""Credentials come from the environment or the usual files, and stand in nothing that is written: URLs with one are refused.

`refuse_secrets` guards what a user gives before anything of it is written; `public` is for what is shown and may hold one all
the same: addresses of trackers, errors of libraries. What a credential is follows from where it stands in a URL, not from how
it looks: before the @ of a host, or as the value of a key of query or fragment that names a secret. In doubt it is one.
"""

import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import UserError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.I)
_USERS = re.compile(
    r"(?:ssh|sftp|scp|git\+ssh|hdfs|webhdfs|(?:postgres(?:ql)?|mysql|mariadb|mssql|oracle)(?:\+\w+)?)://", re.I
)
"""Here USER@HOST is an account without a password, as 'ui --team' takes one; elsewhere it is a key or a token."""
_PLACES = re.compile(r"(?:abfss?|wasbs?)://", re.I)
"""CONTAINER@ACCOUNT."""
_WITH_PORT = re.compile(r"(?:https?|wss?|ftps?|tcp|ray|grpc|ssh|sftp|hdfs|webhdfs)://", re.I)
_PORT = re.compile(r"\d{1,5}")
_PAIR = re.compile(r"[?&;#]([\w.%+~$\[\]-]+)=((?:(?![&;#?][\w.%+~$\[\]-]+=)\S)+)")
_NAMED = re.compile(
    r"pass(?:word|wd|phrase)|passwd|token|secret|signature|credential|(?:api|access|private|account|shared)[-_.]?key",
    re.I,
)
_WORDS = frozenset(
    (
        "auth",
        "authorization",
        "bearer",
        "code",
        "cookie",
        "jwt",
        "key",
        "otp",
        "pass",
        "pat",
        "pin",
        "pwd",
        "sas",
        "sig",
    )
)
_MARK = "..."
_MAX_DEPTH = 3
_MIN_HIDDEN = 6
"""Characters: a shorter value of a variable (a number, "true") is a part of too many words."""


def public(text: str) -> str:
    """`text` without the user, password or token that a URL in it carries. Rather loses more than that than less."""
    return "".join(_clean(scheme, rest) if scheme else rest for scheme, rest in _urls(text))


class Hidden:
    """Takes out of texts what the variables of this process hold under names of secrets, and `public` what URLs carry."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        values = {v for k, v in environment.items() if _names_a_secret(k) and len(v) >= _MIN_HIDDEN}
        self._values = sorted(values, key=len, reverse=True)

    def in_text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, _MARK)
        return public(text)


def has_secret(text: str, depth: int = 0) -> bool:
    """Whether a URL in `text` carries a password, an access key, a token or a signature; `depth`: quoted so many times."""
    urls = [(scheme, rest) for scheme, rest in _urls(text) if scheme]
    return any(_credentials(scheme, rest) is not None or any(_secret_pairs(rest, depth)) for scheme, rest in urls)


def _urls(text: str) -> Iterator[tuple[str, str]]:
    """("", what comes before the first URL), then (scheme, all up to the next URL) of each."""
    schemes = list(_SCHEME.finditer(text))
    yield "", text[: schemes[0].start() if schemes else None]
    ends = [match.start() for match in schemes[1:]] + [len(text)]
    for scheme, end in zip(schemes, ends, strict=bool(schemes)):
        yield scheme[0], text[scheme.end() : end]


def _clean(scheme: str, rest: str) -> str:
    end = _credentials(scheme, rest)
    if end is None and not _PLACES.match(scheme):
        end = _end_of_user(rest)
    rest = rest[end or 0 :]
    for start, end in reversed(list(_secret_pairs(rest))):
        rest = rest[:start] + _MARK + rest[end:]
    return scheme + rest


def _end_of_user(rest: str) -> int | None:
    match = re.match(r"[^/?#\s'\"]*@", rest)
    return match.end() if match else None


def _credentials(scheme: str, rest: str) -> int | None:
    """Where the host begins after a user and password, or a key; None where there are none.

    Passwords hold anything, a /, a ?, a quote or a blank too, though an address should have them quoted.
    """
    line = rest.partition("\n")[0]
    head = re.match(r"[^/?#\s'\"@]*", line)
    assert head is not None
    if "@" not in line:
        return None
    last = line.rindex("@") + 1
    user, colon, password = head[0].partition(":")
    if colon:
        is_followed = line[head.end() :].startswith("@")
        is_port = _WITH_PORT.match(scheme) and user and _PORT.fullmatch(password) and not is_followed
        return None if is_port else last
    if line[head.end() :].startswith("@"):
        # A second @ would be in a path.
        return None if _USERS.match(scheme) or _PLACES.match(scheme) else _end_of_user(line)
    # A user's name with a blank or a quote in it, up to the colon.
    odd = re.match(r"[^/?#@]*:[^@/]*@", line)
    return last if odd else None


def _secret_pairs(rest: str, depth: int = 0) -> Iterator[tuple[int, int]]:
    """Spans of the values of keys that name a secret, or that hold such pairs or URLs themselves, quoted."""
    for match in _PAIR.finditer(rest):
        key, value = urllib.parse.unquote_plus(match[1]), match[2]
        if value != _MARK and (_names_a_secret(key) or _holds_a_secret(value, depth)):
            yield match.span(2)


def _names_a_secret(key: str) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)
    return _NAMED.search(key) is not None or any(word.lower() in _WORDS for word in words)


def _holds_a_secret(value: str, depth: int) -> bool:
    plain = urllib.parse.unquote_plus(value)
    if depth >= _MAX_DEPTH or ("=" not in plain and "://" not in plain and plain == value):
        return False
    # A connection string: "DRIVER=...;UID=...;PWD=...", perhaps with blanks and quoted once more.
    pairs = re.sub(r"\s", "", "?" + plain.lstrip("?&;#"))
    return (
        has_secret(plain, depth + 1)
        or any(_secret_pairs(pairs, depth + 1))
        or (plain != value and _holds_a_secret(plain, depth + 1))
    )


def refuse_secrets(values: Any, where: str) -> None:
    """UserError if any text in `values` (containers too) is a URL with credentials; the sentence does not repeat them."""
    if isinstance(values, str):
        if has_secret(values):
            raise UserError(
                f"{where} holds a URL with credentials ({public(values)} without them): what is given here is written down and "
                "shown; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use the store's own file of credentials"
            )
    elif isinstance(values, dict):
        for value in values.values():
            refuse_secrets(value, where)
    elif isinstance(values, list | tuple):
        for value in values:
            refuse_secrets(value, where)


def refuse_secrets_of_a_tracker(uri: str | None) -> None:
    """UserError for a --tracking-uri with credentials: every user of the machine can read a command line, and so can tools
    that keep it (Ray's logs hold that of its driver). The variables that are named instead are the clients' own."""
    if uri and (has_secret(uri) or ("@" in uri and uri.lower().startswith("http"))):
        instead = (
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            if uri.startswith(("http://", "https://"))
            else "PGPASSWORD (PostgreSQL), or the database's own file of passwords"
        )
        raise UserError(
            f"--tracking-uri holds credentials ({public(uri)} without them), and everybody on this machine can read a command "
            f"line; leave them out and set {instead}"
        )
