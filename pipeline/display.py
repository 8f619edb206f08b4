"""Text that people see: one function for each place that gives some characters a meaning.

Names, keys, classes, paths and errors come from datasets, checkpoints, ledgers and libraries that others wrote. `visible` and
`terminal` are for a screen or a log, `shell` for a command that may be typed again, `csv_cell` for a spreadsheet, `markdown` and
`markdown_code` for cards and MLflow's notes. HTML is made by templates that escape by themselves
(`transfer.report.html_page`). Numbers may be given as they are.
"""

import os
import re
import shlex
import unicodedata
from collections.abc import Iterable
from typing import Any

MAX_CHARACTERS = 4000
"""Of one text on a terminal: a name of a megabyte would push everything else away."""
_JOINERS = "\u200c\u200d"  # invisible, but part of the spelling of Persian and Indic words, and of emoji
_CONTROL_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_FORMULA = re.compile(r"\s*[=+\-@\t\r\uff0b\uff0d\uff1d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?%?")
_MARKUP = re.compile(
    r"([\\`*_{}\[\]|~]|:(?=//)|(?<=www)\.)", re.IGNORECASE
)  # spans, tables, and what becomes a link by itself
_BLOCK = re.compile(r"^(\s*)(?:([#+=-])|(\d+)([.)])(?=\s|$))")  # headings and lists


def visible(value: Any) -> str:
    r"""`value` as text of one line in which every character is seen: `\x1b`, `\n`, `\u202e` are written out.

    That concerns control characters (escape sequences of terminals start with one), overrides of the writing direction, other
    invisible characters, separators of lines and paragraphs, and halves of surrogate pairs. None is "".
    """
    text = "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_written_out(c) if _is_control(c) else c for c in text)


def terminal(value: Any, *, keep_lines: bool = False, max_characters: int = MAX_CHARACTERS) -> str:
    """`value` for a terminal or a log file: `visible`, and cut in the middle where it is longer than `max_characters`.

    Args:
        keep_lines: line ends stay, for text that has several lines by right (a traceback, a table).
    """
    text = "" if value is None else str(value)
    if len(text) > max_characters:
        half = max_characters // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters more) ... {text[-half:]}"
    return "\n".join(map(visible, text.split("\n"))) if keep_lines else visible(text)


def shell(words: Iterable[str]) -> str:
    r"""Words of a command as one line for a shell: what `visible` would write out is in $'...', which gives the same bytes back
    (bash, zsh, POSIX of 2024)."""

    def quoted(word: str) -> str:
        if not any(map(_is_control, word)):
            return shlex.quote(word)
        escaped = word.replace("\\", r"\\").replace("'", r"\'")
        return "$'" + "".join(_bytes_of(c) if _is_control(c) else c for c in escaped) + "'"

    return " ".join(map(quoted, words))


def shortened(value: Any, max_characters: int) -> str:
    """`visible`, and cut at the end where it is longer: for a cell of a table or a label of a plot."""
    text = visible(value)
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"


def csv_cell(value: Any) -> Any:
    """`value` for csv.writer: what a spreadsheet would take for a formula begins with an apostrophe, which marks text.

    Numbers, and texts that are plain numbers (-0.5, +1e-3), stay as they are.
    """
    if isinstance(value, int | float):
        return value
    text = "" if value is None else str(value)
    is_formula = _FORMULA.match(text) is not None and _NUMBER.fullmatch(text) is None
    return ("'" if is_formula else "") + visible(text)


def markdown(value: Any) -> str:
    """`value` as plain text of Markdown, in a sentence, a list or a cell of a table: no markup, no HTML, no link, one line."""
    text = _BLOCK.sub(_with_backslash, _MARKUP.sub(r"\\\1", visible(value)))
    # As entities and not with a backslash, which not every renderer knows before these (MLflow's Showdown does not).
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(value: Any, *, language: str | None = None) -> str:
    """`value` as code of Markdown: a span, or with a `language` ("" for none) a block that keeps its lines.

    The fence is longer than any run of backticks in the text, so that the text cannot end it.
    """
    text = str(value)
    longest = max(map(len, re.findall("`+", text)), default=0)
    if language is not None:
        fence = "`" * max(3, longest + 1)
        return f"{fence}{language}\n{terminal(text, keep_lines=True, max_characters=len(text))}\n{fence}"
    fence, text = "`" * (longest + 1), visible(text)
    padding = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def _with_backslash(found: re.Match[str]) -> str:
    space, sign, number, end = found.groups()
    return f"{space}\\{sign}" if sign else f"{space}{number}\\{end}"


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROL_CATEGORIES and character not in _JOINERS


def _bytes_of(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def _written_out(character: str) -> str:
    code = ord(character)
    short = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character)
    return short or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
