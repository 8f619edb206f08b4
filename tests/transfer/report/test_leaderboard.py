"""Many sweeps on one page: what is ranked, what a browser does with it, and what it takes from outside."""

import csv
import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

from orchestration.cli import main
from pipeline.storage import objects
from tests.orchestration.pages import find_browser, look
from tests.s3_server import bucket
from tests.transfer.records import edit_entry
from tests.transfer.report.test_hostile_ledger import ATTACK, RUN, Tags
from transfer.report.html_page import check_links
from transfer.report.leaderboard import Board, board, render, to_csv
from transfer.report.write_report import write_report


@pytest.fixture(scope="module")
def place(digits_sweep: Path, more_sweeps: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three sweeps, one of them with a page, and a damaged one."""
    out = tmp_path_factory.mktemp("many") / "a b"
    shutil.copytree(digits_sweep, out / "one")
    shutil.copytree(more_sweeps[0], out / "deep" / "other")
    shutil.copytree(more_sweeps[1], out / "l2")
    shutil.copytree(digits_sweep, out / "damaged")
    edit_entry(next((out / "damaged" / "trials").iterdir()), value=2.0)
    write_report(out / "one", out / "one" / "report", show=False)
    return out


@pytest.fixture(scope="module")
def found(place: Path) -> Board:
    return board([str(place)], str(place))


@pytest.fixture(scope="module")
def page(found: Board) -> str:
    return render(found)


def test_only_what_was_measured_alike_is_ranked(found: Board) -> None:
    by_sweep = {sweep: [p for p in found.places if p.sweep.endswith(sweep)] for sweep in ("one", "deep/other", "l2")}
    assert all(len(places) == 3 for places in by_sweep.values()) and len(found.places) == 9
    assert all(p.num_ranked == 2 for p in by_sweep["one"] + by_sweep["deep/other"])
    assert {p.row.method: p.num_ranked for p in by_sweep["l2"]}["ridge"] == 0  # another protocol
    for one, other in zip(by_sweep["one"], by_sweep["deep/other"], strict=True):
        assert (one.rank < other.rank) == (one.row.pretrained.mean > other.row.pretrained.mean)  # type: ignore[union-attr]


def test_a_damaged_sweep_is_named_and_the_others_are_shown(found: Board, page: str, place: Path) -> None:
    ((sweep, why),) = found.passed_over.items()
    assert sweep == str(place / "damaged") and "trials" in why and "Not shown" in page


@pytest.mark.parametrize(
    "source",
    [
        {"model": "nfnet_of_another_version"},
        {"classes": 10**18},
        {"model": "timm:vit_tiny_patch16_224", "options": {"depth": 10_000}},
    ],
)
def test_a_network_that_cannot_be_made_here_ends_no_board(
    digits_sweep: Path, tmp_path: Path, source: dict[str, object]
) -> None:
    for name in ("good", "odd"):
        shutil.copytree(digits_sweep, tmp_path / name)
    info = json.loads((tmp_path / "odd" / "sweep.json").read_text())
    info["plan"]["sources"][0] |= source
    (tmp_path / "odd" / "sweep.json").write_text(json.dumps(info))
    lines = list(csv.DictReader(to_csv(board([str(tmp_path)], str(tmp_path)).places).splitlines()))
    assert {(line["sweep"].endswith("odd"), line["param_count"] == "") for line in lines} == {
        (True, True),
        (False, False),
    }


def test_links_lead_to_the_sweeps_pages(found: Board, page: str, place: Path) -> None:
    links = re.findall(r'<a href="([^"]*)"', page)
    assert links == ["one/report/scorecard.html"] * 3 and (place / links[0]).exists()


def test_the_csv_has_timms_columns(found: Board) -> None:
    rows = list(csv.DictReader(to_csv(found.places).splitlines()))
    assert list(rows[0])[:9] == [
        *("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
    ]
    for row in rows:
        assert float(row["top1"]) == pytest.approx(100 * float(row["value"]), abs=1e-3)
        assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert {row["param_count"] for row in rows} != {""} and {row["img_size"] for row in rows} != {""}


def test_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--all", str(place), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "9 results of 3 sweeps" in out and "not shown: " in out
    assert {p.name for p in tmp_path.iterdir()} == {"leaderboard.html", "leaderboard.csv"}
    assert main(["report", "--all", str(tmp_path)]) == 2 and "no sweep below" in capsys.readouterr().err
    assert main(["report", "--all", str(place), "--rerun", "x"]) == 2 and "leave out --all" in capsys.readouterr().err


def test_what_a_sweep_holds_is_text(found: Board) -> None:
    attack = ATTACK.replace("URL", "http://127.0.0.1:9")
    row = dataclasses.replace(found.places[0].row, task_title=attack, method=attack, backbone=attack, verdict=attack)
    evil = dataclasses.replace(found.places[0], row=row, model=attack, name=attack)
    shown = render(Board([evil, *found.places], {attack: attack}, 5))
    tags = Tags(shown)
    assert shown.count("<script") == 1 and not any(name.startswith("on") for name in tags.attributes)
    assert not tags.tags & {"img", "svg", "link", "iframe", "base"} and not re.search("[\x00-\x08\x1b\u202e]", shown)
    for wrong in ("javascript:x", "http://elsewhere", "one/report/scorecard.html"):
        with pytest.raises(RuntimeError, match="links of the page"):
            check_links(f'<a href="{wrong}">x</a>', own=["href of <a>: other"])


def in_browser(page: str, script: str, folder: Path, size: str = "1200x900", picture: Path | None = None) -> str:
    """What `script` (an expression, or a promise of one) gives in the page, as text."""
    free = re.sub(r"<meta http-equiv.*?>", "", page)
    tail = f"<script>Promise.resolve().then(() => ({script})).then(x => {{ document.title = JSON.stringify(x); }})</script>"
    (folder / "page.html").write_text(free.replace("</body>", f"{tail}</body>"))
    shown = look((folder / "page.html").as_uri(), picture, size)
    title = re.search(r"<title>(.*?)</title>", shown, re.DOTALL)
    assert title is not None
    return title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium")


@needs_browser
@pytest.mark.slow
def test_a_browser_sorts_and_filters_and_runs_nothing_else(page: str, found: Board, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page)
    assert "9 of 9 results" in look((tmp_path / "page.html").as_uri())  # the page's own policy lets its script run
    raw = page.replace("</main>", f"<script>{RUN}</script></main>")
    (tmp_path / "page.html").write_text(raw)
    assert "<title>Leaderboard</title>" in look((tmp_path / "page.html").as_uri())
    values = "[...document.querySelectorAll('tbody tr:not([hidden])')].map(r => Number(r.cells[5].dataset.key))"
    button = "[...document.querySelectorAll('th button')][5]"
    down = json.loads(in_browser(page, f"({button}.click(), {values})", tmp_path))
    up = json.loads(in_browser(page, f"({button}.click(), {button}.click(), {values})", tmp_path))
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(up) == 9
    event = "new Event('input', {bubbles: true})"
    choose = f"(s => {{ s.value = '5'; s.dispatchEvent({event}); }})(document.getElementById('by-shots'))"
    num = sum(place.row.shots == 5 for place in found.places)
    assert 0 < num == len(json.loads(in_browser(page, f"({choose}, {values})", tmp_path))) < 9
    said = "document.getElementById('shown').textContent"
    assert f"{num} of 9" in in_browser(page, f"({choose}, {said})", tmp_path)


def on_a_phone(page: str, folder: Path) -> dict[str, int]:
    """Chromium has no window narrower than 500 px, so that a frame of 360 px stands for the phone."""
    inner = json.dumps(re.sub(r"<meta http-equiv.*?>", "", page)).replace("</", r"<\/")
    script = f"""new Promise(done => {{ const f = document.querySelector('iframe'); f.onload = () => {{
      const d = f.contentDocument, w = d.documentElement;
      const cut = [...d.querySelectorAll('td, label, h1, p')].filter(e => e.getClientRects().length &&
        (e.getBoundingClientRect().right > 360.5 || e.scrollWidth > e.clientWidth + 1));
      done({{width: w.scrollWidth, cut: cut.length, cells: d.querySelectorAll('td').length}}); }}; f.srcdoc = {inner}; }})"""
    outer = "<!doctype html><html><title></title><body><iframe width=360 height=740 style='border:0'></iframe></body></html>"
    found: dict[str, int] = json.loads(in_browser(outer, script, folder))
    return found


@needs_browser
@pytest.mark.slow
def test_a_phone_shows_every_cell(page: str, tmp_path: Path) -> None:
    assert on_a_phone(page, tmp_path) == {"width": 360, "cut": 0, "cells": 9 * 13}


@needs_browser
@pytest.mark.slow
def test_a_board_of_a_bucket_is_read_on_a_phone(
    digits_sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a real S3 server: sweeps are found below a prefix, and the page links theirs by a relative address."""
    with bucket(tmp_path / "server") as place:
        for path in filter(Path.is_file, digits_sweep.rglob("*")):
            objects.write_bytes(f"{place}/sweeps/one/{path.relative_to(digits_sweep)}", path.read_bytes())
        assert main(["report", f"{place}/sweeps/one"]) == 0
        assert main(["report", "--all", f"{place}/sweeps"]) == 0
        page = objects.read_bytes(f"{place}/sweeps/leaderboard.html").decode()
        assert objects.exists(f"{place}/sweeps/leaderboard.csv")
    assert "3 results of 1 sweep\n" in capsys.readouterr().out and "<h1>3 results of 1 sweep</h1>" in page
    assert re.findall(r'<a href="([^"]*)"', page) == ["one/report/scorecard.html"] * 3
    assert on_a_phone(page, tmp_path) == {"width": 360, "cut": 0, "cells": 3 * 13}


@needs_browser
@pytest.mark.slow
def test_axe_finds_nothing(page: str, tmp_path: Path) -> None:
    homes = [importlib.util.find_spec(name) for name in ("axe_playwright_python", "axe_core_python")]
    home = next((h.submodule_search_locations[0] for h in homes if h and h.submodule_search_locations), None)
    if home is None:
        pytest.skip("no axe: pip install axe-core-python")
    axe = (Path(home) / "axe.min.js").read_text()
    for size in ("1200x900", "600x900"):
        script = "axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 200))]))"
        text = in_browser(page.replace("</main>", "</main><script>" + axe + "</script>"), script, tmp_path, size)
        assert json.loads(text) == []
