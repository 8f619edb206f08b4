"""The note of a sweep in MLflow: the scorecard's one table, and names that are no markup."""

from markdown_it import MarkdownIt

from orchestration.tracking import sweep_summary
from transfer.results.scorecard import Row
from transfer.results.scorecard_table import COLUMNS
from transfer.results.statistics import Estimate

ATTACK = "<img src=x onerror=y>|[a](javascript:b)`\n# c\x1b[2J"


def row(backbone: str) -> Row:
    half = Estimate(0.5, 3, 0.4, 0.6, "t")
    return Row(
        task="t", task_title=ATTACK, method=ATTACK, shots=-1000, metric="top1", pretrained=half, scratch=None, gain=half,
        verdict="wins", num_failed=1, protocol_digest="p", backbone=backbone,
    )  # fmt: skip


def test_the_note_draws_the_table_that_the_report_draws() -> None:
    header, _, line, _ = sweep_summary.scorecard_table([row("a"), row("b")])
    titles = [cell.strip() for cell in header.replace(sweep_summary.GAP, "").strip("| ").split("|")]
    assert titles == [column.title for column in COLUMNS]
    assert "VTAB" in line and "+50.0\u00a0±\u00a010.0" in line and "wins, 1 failed" in line


def test_what_a_sweep_is_called_is_no_markup_of_its_note() -> None:
    tags = {f"best.{ATTACK}": ATTACK, "failures": f"{ATTACK}\n{ATTACK}"}
    note = sweep_summary.note([row("a"), row(ATTACK)], tags)
    blocks = MarkdownIt().enable("table").parse(note)
    tokens = [token for one in blocks for token in (one, *(one.children or ()))]
    assert not {"html_block", "html_inline", "link_open", "image", "heading_open"} & {token.type for token in tokens}
    assert sum(token.type == "td_open" for token in tokens) == 2 * len(COLUMNS) and "\x1b" not in note
