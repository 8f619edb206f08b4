"""The pages of documentation: what they tell a reader to type can be typed, and what they name is there."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from orchestration.cli import _parse, build_parser, main
from pipeline import recipes
from pipeline.training.run import override

ROOT = Path(__file__).parents[1]
FRONT = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in FRONT), ROOT / "datasets/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HISTORY = {"CHANGELOG.md", "docs/LOG.md", "docs/log/2026-11-21.md"}
"""They name what was there at the time."""
PRESENT = [p for p in PAGES if str(p.relative_to(ROOT)) not in HISTORY]
LONGEST = {
    "README.md": 150,
    "CHANGELOG.md": 1000,
    "docs/LOG.md": 1000,
    "docs/log/2026-11-21.md": 1000,
    "docs/configuration.md": 1000,
}
FOLDERS = "nfnet|pipeline|transfer|orchestration|tests|benchmarks|datasets|docs"
BASE = recipes.get("nfnet_tiny_glyphs")
CHEAP = {"--list", "--show", "--help-fields", "--help", "cards", "--dry-run", "--kubernetes", "--ray"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    """Lines of the fenced blocks that are no Python, continued ones joined, comments gone."""
    fenced = re.findall(r"^```(?!python)[a-z]*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(fenced).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines]


def inline(page: Path) -> list[str]:
    """What stands between single backquotes, over line ends too."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


COMMANDS = sorted(
    {
        found[1]
        for page in PRESENT
        for line in blocks(page)
        for part in line.split(";")
        if (found := re.match(r"(?:[A-Z_]+=\S+ +|do +)*normfree ((?!is done).*)", part.strip()))
    }
)


def parsed(words: list[str]) -> argparse.Namespace:
    """By the real parser; the fields of a run are put into a recipe."""
    args = _parse(build_parser(), words)
    if args.command in ("pretrain", "launch", "plan"):
        is_name = args.recipe and args.recipe != "transfer" and not args.recipe.endswith(".yaml")
        override(recipes.get(args.recipe) if is_name else BASE, args.fields)
    return args


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_of_ours(command: str) -> None:
    words = [word for word in shlex.split(command) if word != "..."]
    assert parsed(words).handler


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if CHEAP & set(c.split()) or c.startswith("inspect nfnet_tiny")]
)
def test_a_quick_command_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)) == 0 and capsys.readouterr().out


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_commands_and_options_in_sentences_are_ours(page: Path) -> None:
    for code in inline(page):
        if not code.startswith("normfree "):
            continue
        parser = build_parser()
        words = re.split(r"\s+", code)[1:]
        while words and any(isinstance(a, argparse._SubParsersAction) for a in parser._actions):
            word = words.pop(0)
            if word.startswith("-") or word == "COMMAND":
                break
            parser = parser.command(word)  # KeyError: no such command
        unknown = {word for word in words if re.match(r"--[a-z]", word)} - set(parser.options())
        unknown = {word for word in unknown if "." not in word and not hasattr(BASE, word[2:])}
        assert not unknown - set(build_parser().options()), code


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_make_targets_and_modules_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    codes = blocks(page) + inline(page)
    made = {word for code in codes if (found := re.match(r"make ([a-z-]+)$", code)) for word in [found[1]]}
    assert made <= targets
    for code in codes:
        for module in re.findall(rf"python -m ((?:{FOLDERS})[a-z_.]*)(?: ([a-z_]+))?", code):
            path = ROOT / module[0].replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), code
            assert module[0] != "benchmarks" or not module[1] or (path / f"{module[1]}.py").exists(), code


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_a_named_file_or_test_is_there(page: Path) -> None:
    for code in inline(page):
        if re.fullmatch(rf"(?:{FOLDERS})/[\w./*-]*(?:::\w+)?", code):
            path, _, test = code.partition("::")
            assert list(ROOT.glob(path)), f"{name_of(page)} names {code}"
            assert not test or f"def {test}" in (ROOT / path).read_text(), code


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link and not link.startswith("mailto:"):
            path, _, anchor = link.partition("#")
            place = (page.parent / path).resolve() if path else page
            assert place.exists(), f"{name_of(page)} links {link}"
            assert not anchor or anchor in anchors(place), link


def test_every_page_is_found_from_the_readme_and_short() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        lines = page.read_text().count("\n")
        assert lines <= LONGEST.get(name_of(page), 120), f"{name_of(page)} has {lines} lines"
        assert page.parent != ROOT / "docs" or f"({name_of(page)})" in readme, f"README links no {name_of(page)}"
    assert "## Install" in readme and "(#install)" in readme


def test_the_folders_of_the_map_are_the_folders() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in ("nfnet", "pipeline", "transfer", "orchestration"):
        part = re.search(rf"^{package}/.*\n((?:  .*\n)*)", text, re.MULTILINE)
        assert part
        named = re.findall(r"^  ([a-z_/]+)/ ", part[1], re.MULTILINE)
        folders = {str(p.parent.relative_to(ROOT / package)) for p in (ROOT / package).rglob("__init__.py")}
        folders |= {"suites"} if package == "transfer" else set()
        expected = {f for f in folders if f != "." and f != "data" and "archives" not in f}
        assert set(named) == expected, package
