"""The drill: a configuration of the demo's survives it, and what is not handled is lost (also test_planted_faults.py)."""

import ast
import contextlib
import json
import re
import tempfile
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.operations.drill.scenarios import SCENARIOS
from pipeline import recipes
from pipeline.training.run import dump_yaml, override


def leftovers(folder: Path) -> list[str]:
    """What a drill left of its temporary folder, and processes that were told to use it."""
    found = [str(path) for path in folder.iterdir()]
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            found += [str(environment)] if f"TMPDIR={folder}/".encode() in environment.read_bytes() else []
    return found


def test_a_scenario_is_survived_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary := tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    words = ["drill", "nfnet_tiny_glyphs", "--num-processes", "1", "--scenarios", "changed_data"]
    assert main([*words, "--json", str(tmp_path / "card.json")]) == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert [(s["name"], s["survived"], s["codes"]) for s in card["scenarios"]] == [
        ("undisturbed", True, [0]),
        ("changed_data", True, [2]),
    ]
    assert (card["survived"], card["lost"]) == (2, 0)
    assert "it says 'holds a run on data with digest'" in " ".join(capsys.readouterr().out.split())
    assert leftovers(temporary) == []


def test_a_sentence_that_is_expected_is_one_that_the_software_has() -> None:
    """The drill reads the words of a run: one that was reworded would be called lost."""
    product, expected, said = Path(__file__).parents[4], set[str](), list[str]()
    for path in (p for folder in ("pipeline", "orchestration") for p in (product / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        if path.is_relative_to(product / "orchestration/operations/drill"):
            calls = (n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "expect")
            expected |= {ast.literal_eval(call.args[1]) for call in calls}
        else:
            said += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert len(expected) > 4 and {text for text in expected if not any(text in s for s in said)} == set()


def test_the_page_lists_the_scenarios() -> None:
    page = (Path(__file__).parents[4] / "docs/drill.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page.split("## Scenarios")[1], re.MULTILINE) == [s.name for s in SCENARIOS]


@pytest.mark.slow
def test_the_demos_configuration_survives_all(tmp_path: Path) -> None:
    code = main(["drill", "nfnet_tiny_glyphs", "--json", str(tmp_path / "card.json"), "--keep", str(tmp_path / "kept")])
    card = json.loads((tmp_path / "card.json").read_text())
    assert [(s["name"], s["reason"]) for s in card["scenarios"] if not s["survived"]] == []
    assert [s["name"] for s in card["scenarios"]] == ["undisturbed", *(s.name for s in SCENARIOS)]
    assert code == 0 and card["not_played"] == {}


@pytest.mark.slow
def test_a_configuration_that_is_another_in_all_that_is_kept(tmp_path: Path, digits: str) -> None:
    """Sharded state, bf16, accumulation, mixing, repeats, no unreadable image allowed, the user's own data."""
    changes = {
        "data.url": digits,
        "data.repeats": 2,
        "data.max_lost_share": 0,
        "augment.mixup_alpha": 0.2,
        "engine.zero_stage": 2,
        "engine.precision": "bf16",
        "micro_batch": 16,
        "saving.in_background": False,
    }
    recipe = tmp_path / "run.yaml"
    recipe.write_text(dump_yaml(override(recipes.get("nfnet_tiny_glyphs"), changes)))
    card_file = tmp_path / "card.json"
    code = main(["drill", str(recipe), "--scenarios", "kill_rank,corrupt_shard", "--json", str(card_file)])
    card = json.loads(card_file.read_text())
    assert [(s["name"], s["reason"]) for s in card["scenarios"] if not s["survived"]] == [] and code == 0
    assert "ZeRO stage 2, bf16, 2 accumulated" in card["run"]
    assert card["scenarios"][2]["codes"] == [2]  # the flipped byte ends the run


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("drill nfnet_tiny_glyphs --scenarios kil_rank", "did you mean kill_rank?"),
        ("drill nfnet_tiny_glyps", "did you mean 'nfnet_tiny_glyphs'?"),
        ("drill nowhere.yaml", "no file nowhere.yaml"),
        ("drill nfnet_tiny_glyphs --num-processes 0", "--num-processes is 0"),
        ("drill nfnet_tiny_glyphs --keep {kept}", "is not empty"),
        ("drill nfnet_tiny_glyphs --keep {kept}/mine", "cannot be made"),
        ("drill nfnet_tiny_glyphs --json {kept}/nowhere/card.json", "there is no folder for"),
        ("drill nfnet_tiny_glyphs --data {kept}", "there is no dataset at"),
    ],
)
def test_a_mistake_is_a_sentence_and_2(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine").touch()
    assert main(words.format(kept=tmp_path / "kept").split()) == 2
    assert sentence in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["mine"]
