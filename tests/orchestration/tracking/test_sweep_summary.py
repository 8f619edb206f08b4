"""The note of a sweep in MLflow: the scorecard's one table, and names that are no markup."""

from markdown_it import MarkdownIt

from orchestration.tracking import sweep_summary
from orchestration.tracking.upload import TAG_CHARACTERS
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


def test_a_long_note_ends_with_a_whole_line_and_says_what_is_missing() -> None:
    note = sweep_summary.note([row("a")] * 60, {})
    lines = note.splitlines()
    assert 3500 < len(note) <= TAG_CHARACTERS and lines[-1].endswith("more lines are in the artifact scorecard.html.")
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines[2:-2])


def test_each_trial_of_a_sweep_has_a_name_of_its_own() -> None:
    """Two sources, a search of three candidates in each cell, three seeds of finals."""
    base = {"task": "digits", "method": "linear", "shots": 5, "init": "pretrained", "model": "m"}
    entries = [
        {**base, "backbone": source, "kind": kind, "seed": seed, "digest": f"{place}{number}{seed}" + "0" * 60}
        for place, source in enumerate(("c100, step 90", "c100, step 60"))
        for kind, number, seed in [("search", n, 0) for n in range(3)] + [("final", 9, s) for s in range(3)]
    ]
    names = [sweep_summary.trial_name(entry, several_sources=True) for entry in entries]
    assert len(set(names)) == len(names) == 12 and max(map(len, names)) < 45
    assert names[0].startswith("search ") and names[3] == "final 0 digits linear 5 c100, step 90"
