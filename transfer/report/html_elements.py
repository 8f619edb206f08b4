"""The small pieces of HTML that the report's page is made of. Values go in, escaped text comes out."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

from transfer.results.statistics import Estimate


def esc(value: Any) -> str:
    return "" if value is None else html.escape(str(value), quote=True)


def public(value: Any) -> str | None:
    """Without the user and password that a URL may carry: reports are passed around."""
    text = " ".join(map(str, value)) if isinstance(value, list) else value
    return None if text is None else re.sub(r"(\w://)[^/\s'\"]*@", r"\1", str(text))


def is_said(value: str) -> bool:
    return bool(re.sub(r"<[^>]*>", "", value).strip())


def settings(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {settings(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def plain(value: Estimate, *, sign: bool = False) -> str:
    number = f"{100 * value.mean:+.1f}" if sign else f"{100 * value.mean:.1f}"
    return number.replace("-", "−") + ("" if value.half_width is None else f" ± {100 * value.half_width:.1f}")


def value_with_half(value: Estimate | None, *, sign: bool = False) -> str:
    if value is None:
        return "–"
    number, _, half = plain(value, sign=sign).partition(" ± ")
    return f"{number} <span class=half>{'± ' + half if half else '(one)'}</span>"


def plural(num: int, word: str) -> str:
    return f"{num:,} {word}{'s' * (num != 1)}"


def memory(num_bytes: int) -> str:
    if not num_bytes:
        return "–"
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def pretty(value: Any) -> str:
    """A record as JSON, a line for each field and each item of a list of records: pages hold hundreds of them."""
    text = _json(value)
    if isinstance(value, dict):
        text = "{\n" + ",\n".join(f" {_json(str(key))}: {_field(item)}" for key, item in value.items()) + "\n}"
    # Quotes stand for themselves between tags; as entities they were a third of a page.
    return f"<pre>{html.escape(str(public(text)), quote=False)}</pre>"


def _field(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[\n" + ",\n".join(f"  {_json(item)}" for item in value) + "\n ]"
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def fold(summary: str, body: str, *, name: str = "", is_open: bool = False) -> str:
    """A part that opens on a click; `summary` and `body` are HTML."""
    opening = f"<details{f' id={chr(34)}{name}{chr(34)}' if name else ''}{' open' if is_open else ''}>"
    return f"{opening}<summary>{summary}</summary>{body}</details>"


def anchor(kind: str, name: str) -> str:
    """The id of what `link` leads to."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"


def link(text: str, kind: str, name: str) -> str:
    """`text` is HTML already. Nothing to lead to: the text alone."""
    return f'<a href="#{anchor(kind, name)}">{text}</a>' if name else text


def hours(seconds_s: float) -> str:
    if seconds_s < 90:
        return f"{seconds_s:.0f} s"
    return f"{seconds_s / 60:.0f} min" if seconds_s < 5400 else f"{seconds_s / 3600:.1f} h"


def table_row(values: Sequence[str], *, numbers: set[int], style: str = "") -> str:
    cells = "".join(
        f"<td{' class=n' if i in numbers else ' class=t' if i == 0 else ''}>{v}</td>" for i, v in enumerate(values)
    )
    return f"<tr{f' class={style}' if style else ''}>{cells}</tr>\n"


def table(head: Sequence[str], body: str, *, numbers: set[int]) -> str:
    cells = "".join(f"<th{' class=n' if i in numbers else ''}>{esc(h)}</th>" for i, h in enumerate(head))
    return f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>\n{body}</tbody></table></div>"
