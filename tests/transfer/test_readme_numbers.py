"""The numbers of the front pages are those of the committed scorecards."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from transfer.readme_numbers import PAGES, PLACE, current

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_current(page: str) -> None:
    text = (ROOT / page).read_text()
    assert PLACE.search(text)
    assert current(text, ROOT) == text, "run: python -m transfer.readme_numbers"


def test_no_page_is_committed_that_keeps_old_verdicts() -> None:
    """Two said "wins 7 of 12" and "11 of 16" where the CSV beside them, corrected since, has 3 and 5: `report` makes pages."""
    assert not [*(ROOT / "docs" / "results").rglob("scorecard.html")]


def test_a_scorecard_that_is_not_there_is_refused_and_text_around_a_place_stays(tmp_path: Path) -> None:
    mark = "a\n<!-- numbers: s.csv at 5 -->\nold\n<!-- /numbers -->\nb"
    with pytest.raises(UserError, match=r"no scorecard s\.csv"):
        current(mark, tmp_path)
    demo = (ROOT / "docs/results/demo/scorecard.csv").read_text()
    (tmp_path / "s.csv").write_text(demo)
    found = current(mark, tmp_path)
    assert found.startswith("a\n") and found.endswith("\nb") and "old" not in found
    assert "| Digits (scikit-learn) | 90.1 % against 70.0 %: **+20.1 ± 9.3** |" in found
