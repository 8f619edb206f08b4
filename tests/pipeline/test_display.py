"""Text from outside, where people see it: nothing in it moves a cursor, computes a cell, or becomes markup."""

import csv
import io
import subprocess
import unicodedata

import pytest
from markdown_it import MarkdownIt

from pipeline.display import csv_cell, markdown, markdown_code, shell, shortened, terminal, visible

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.exe\u2028next\u2029\r\n\t\x00\x7f\u200bcat\ufeff\U000e0041\ud800"


def test_every_character_of_a_terminals_text_is_seen() -> None:
    shown = visible(HOSTILE)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert shown.startswith(r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.exe\u2028next") and r"\r\n\t\x00\x7f" in shown
    shown.encode()  # a lone surrogate would not be
    for text in ("Köter, 犬", "می\u200cخواهم", "👩\u200d🔬", "a b"):
        assert visible(text) == text
    assert visible(None) == "" and visible(3) == "3"


def test_lines_stay_only_where_they_are_asked_for_and_length_is_bounded() -> None:
    assert terminal("a\nb\r\x1b[K") == r"a\nb\r\x1b[K"
    assert terminal("a\nb\r\x1b[K", keep_lines=True) == "a\nb" + r"\r\x1b[K"
    long = terminal("x" * 1_000_000)
    assert len(long) < 4100 and "996,000 characters more" in long
    assert shortened("a\n" + "x" * 50, 10) == r"a\nxxxxxx…" and shortened("x" * 10, 10) == "x" * 10


def test_a_shell_reads_the_words_of_a_printed_command_as_they_were() -> None:
    words = ["runs/a b%20c#?e", "x\ny'\"\\n$HOME`ls`", "\x1b[31m\u202eä日\udcff", "plain"]
    line = shell(words)
    assert terminal(line) == line and line.endswith(" plain") and shell(["a b", "c"]) == "'a b' c"
    read = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    assert read.decode("utf-8", "surrogateescape").split("\0")[:-1] == words


@pytest.mark.parametrize("cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", " =1", "=", "－1"])
def test_a_cell_that_a_spreadsheet_would_compute_is_marked_as_text(cell: str) -> None:
    assert csv_cell(cell).startswith("'") and "\t" not in csv_cell(cell) and "\r" not in csv_cell(cell)


@pytest.mark.parametrize("cell", [-0.5, 7, True, "-0.5", "+1e-3", "-.5", "12", "digits", "a-b", "", "-12.5%"])
def test_numbers_and_plain_names_stay_as_they_are(cell: object) -> None:
    assert csv_cell(cell) == cell


def test_a_csv_file_of_hostile_cells_has_as_many_rows_as_were_written() -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow([csv_cell('a"b\r\n=1,2'), csv_cell(None), csv_cell("x\u2028y")])
    assert list(csv.reader(io.StringIO(stream.getvalue()))) == [['a"b\\r\\n=1,2', "", r"x\u2028y"]]
    assert len(stream.getvalue().splitlines()) == 1


def test_markdown_escapes_what_has_a_meaning_and_leaves_names_readable() -> None:
    assert markdown("<img src=x>|[a](b)&amp;") == r"&lt;img src=x&gt;\|\[a\](b)&amp;amp;"
    assert markdown("nfnet_f0 (1.5)") == r"nfnet\_f0 (1.5)" and markdown("HTTP://www.x.y") == r"HTTP\://www\.x.y"
    assert markdown("10. a") == r"10\. a" and markdown("0.9 a-b") == "0.9 a-b" and markdown("- a\n# b") == r"\- a\\n# b"


HOSTILE_MARKDOWN = (
    "<img src=x>",
    "[a](b)",
    "![a](b)",
    "*a* **b** _c_",
    "`a`",
    "<http://a>",
    "&copy;",
    "a\n\n# b",
    "1) a",
    "# a",
    "- a",
)


@pytest.mark.parametrize("text", HOSTILE_MARKDOWN)
@pytest.mark.parametrize("before", ["", "a "])
def test_markdown_shows_a_text_as_it_is(text: str, before: str) -> None:
    (_, inline, _) = MarkdownIt().parse(before + markdown(text))
    assert {token.type for token in inline.children or ()} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children or ()) == before + visible(text)


def test_code_cannot_end_its_fence() -> None:
    assert markdown_code("a`b``c") == "```a`b``c```" and markdown_code("`") == "`` ` ``" and markdown_code("") == "`  `"
    block = markdown_code("x: 1\n```\n# not a heading\n````", language="yaml")
    assert block.splitlines()[0] == "`````yaml" and block.splitlines()[-1] == "`````"
