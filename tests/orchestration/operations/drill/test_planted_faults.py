"""A fault that a run does not handle is found by the drill: planted into the run's own processes, or by its configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from pipeline import recipes
from pipeline.training.run import dump_yaml, override

PLANTED = Path(__file__).parent / "planted"


def lost(folder: Path, recipe: str, *words: str) -> dict[str, str]:
    """Reasons by scenario, of those that were lost."""
    code = main(["drill", recipe, *words, "--json", str(folder / "card.json")])
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    found = {s["name"]: s["reason"] for s in card["scenarios"] if not s["survived"]}
    assert code == bool(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "scenario", "loser", "reason"),
    [
        (
            "resume ignores checkpoints",
            "kill_all",
            "kill_all",
            "it went on at step 0, and the checkpoint of step 10 stood",
        ),
        ("momentum is lost", "kill_all", "kill_all", ""),
        ("a sample is not in the ledger", "kill_all", "undisturbed", "the ledger does not add up"),
        ("a folder has many owners", "two_starts", "two_starts", "in place of 2"),
    ],
)
def test_what_is_not_handled_is_lost(
    fault: str, scenario: str, loser: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PLANTED))
    monkeypatch.setenv("PLANTED_FAULT", fault)
    found = lost(tmp_path, "nfnet_tiny_glyphs", "--num-processes", "1", "--scenarios", scenario)
    assert list(found) == [loser] and reason in found[loser]


@pytest.mark.slow
def test_without_a_watchdog_a_frozen_rank_is_lost(tmp_path: Path) -> None:
    run = override(recipes.get("nfnet_tiny_glyphs"), {"watchdog.limit_s": 0})
    (tmp_path / "run.yaml").write_text(dump_yaml(run))
    found = lost(tmp_path, str(tmp_path / "run.yaml"), "--scenarios", "freeze")
    assert found == {"freeze": "nobody had reported the frozen rank after 60 s"}
