"""Credentials come from the environment or the usual files, and stand in nothing that is written: URLs with one are refused.

`refuse_secrets` guards what a user gives before anything of it is written; `public` is for what is shown and may hold one all
the same: addresses of trackers, errors of libraries.
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import UserError

_QUERY = r"([?&;](?:[\w.-]*(?:password|passwd|token|secret|signature|credential|key)[\w.-]*|sig)=)[^&;\s'\"]+"
_SIGNED = re.compile(
    r"://.*[?&;][\w.-]*(?:password|passwd|token|secret|signature|credential|access_?key|\bsig)=[^&;\s'\"]+", re.I
)
_PASSWORD = re.compile(r"\w://[^/\s'\"@:]*:[^/\s'\"]*@")
_USER = re.compile(r"(?:s3a?|gs|gcs|https?)://[^/\s'\"]*@")  # elsewhere user@host is an account, container@host a place


def public(text: str) -> str:
    """`text` without the user, password or token that a URL in it carries."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1", text)
    return re.sub(_QUERY, r"\1...", text, flags=re.IGNORECASE)


def has_secret(text: str) -> bool:
    """Whether a URL in `text` carries a password, an access key or a signature."""
    return "://" in text and any(kind.search(text) for kind in (_PASSWORD, _USER, _SIGNED))


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
    if uri and has_secret(uri):
        instead = (
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            if uri.startswith(("http://", "https://"))
            else "PGPASSWORD (PostgreSQL), or the database's own file of passwords"
        )
        raise UserError(
            f"--tracking-uri holds credentials ({public(uri)} without them), and everybody on this machine can read a command "
            f"line; leave them out and set {instead}"
        )
