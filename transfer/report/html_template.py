"""Fills the templates of the report's page, which are in `templates/`.

What a template prints is escaped, without control characters and without the passwords of URLs, because the environment does that
to every value: ledgers, cards and errors come from anywhere. Text that is markup already (`Markup`) is made by the templates'
macros, by `record` below and by `transfer.report.plots`, and nowhere else.
"""

import functools
import hashlib
import html
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.display import visible
from pipeline.secrets import public
from transfer.results.scorecard import shots_phrase, shots_text, start_of
from transfer.results.scorecard_table import p_text

INITS = {"pretrained": "pretrained", "scratch": "from scratch"}


def fill(template: str, **values: Any) -> Markup:
    """A template of `templates/`, filled."""
    return Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> Environment:
    folder = Path(__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "anchor": anchor,
        "count": lambda number: f"{number:,}",
        "hours": hours,
        "init": lambda init: INITS.get(init, init),
        "memory": memory,
        "minus": lambda number: number.replace("-", "−"),
        "p": p_text,
        "percent": lambda share, digits=1: f"{100 * share:.{digits}f}",
        "plural": plural,
        "record": record,
        "settings": settings,
        "shots": shots_text,
        "shots_phrase": shots_phrase,
        "start": start_of,
        "time": time_text,
    }
    return environment


def _shown(value: Any) -> Any:
    """What every value of a template goes through before it is escaped."""
    if isinstance(value, Markup):
        return value
    return visible(public(value)) if isinstance(value, str) else visible(value)


def anchor(name: str, kind: str) -> str:
    """The id of a place of the page. Names that differ have ids that differ."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    own = "" if plain == name else f"-{hashlib.sha256(name.encode(errors='backslashreplace')).hexdigest()[:8]}"
    return f"{kind}-{plain}{own}"


def plural(num: int, word: str) -> str:
    return f"{num:,} {word}{'s' * (num != 1)}"


def hours(seconds_s: float) -> str:
    if seconds_s < 90:
        return f"{seconds_s:.0f} s"
    return f"{seconds_s / 60:.0f} min" if seconds_s < 5400 else f"{seconds_s / 3600:.1f} h"


def memory(num_bytes: int) -> str:
    if not num_bytes:
        return "–"
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def time_text(seconds_s: Any, form: str = "%Y-%m-%d %H:%M:%S UTC") -> str:
    """Of Unix time; "" where a record has none, or what is no time."""
    try:
        return datetime.fromtimestamp(seconds_s, UTC).strftime(form) if seconds_s else ""
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def settings(value: Any) -> str:
    """Hyper-parameters or hardware in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {settings(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def record(value: Any) -> Markup:
    """A record as JSON, a line for each field and each item of a list of records: pages hold hundreds of them."""
    text = _json(value)
    if isinstance(value, dict):
        text = "{\n" + ",\n".join(f" {_json(str(key))}: {_field(item)}" for key, item in value.items()) + "\n}"
    # Quotes stand for themselves between tags; as entities they were a third of a page.
    return Markup(html.escape(public(text), quote=False))


def _field(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(f"  {_json(item)}" for item in value) + "\n ]"
    return _json(value)


def _json(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
