"""A ledger whose every text wants to be markup: the page shows it as text, and a browser runs nothing and asks nobody."""

import csv
import dataclasses
import http.server
import io
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.format.manifest import Manifest
from tests.orchestration.pages import find_browser, look
from transfer.report import html_template
from transfer.report.html_page import check_links, render
from transfer.report.html_template import anchor
from transfer.report.plots import picture
from transfer.report.scorecard_csv import to_csv
from transfer.report.write_report import print_comparisons, print_table
from transfer.results.comparison import comparisons
from transfer.results.scorecard import scorecard
from transfer.results.sweep_results import Findings, load_findings

TEMPLATES = Path(html_template.__file__).with_name("templates")
RUN = "document.title='RAN'"
ATTACK = (
    f"=1+1\x1b]0;x\x07\u202e\u2028</pre></style></title>\"'><script>{RUN}</script>"
    f'<img src=URL/image onerror="{RUN}"><svg/onload={RUN}><link rel=stylesheet href=URL/style><base href=URL/>'
    "<a href='javascript:x'>{{7*7}}$x_^$"
)


def hostile(value: Any, attack: str) -> Any:
    """`value` with the attack in every text, key and digest; numbers of records become texts, too."""
    if isinstance(value, dict):
        return {f"{key}{attack}": hostile(item, attack) for key, item in value.items()} | value
    return f"{value}{attack}" if isinstance(value, str) else value


def attacked(findings: Findings, attack: str) -> Findings:
    """The same numbers, with an attack wherever a ledger holds text, or holds something else and is not checked."""
    keep = {"kind", "init", "status", "digest", "selection", "method_kind", "history", "metric"}

    def entry(one: Any) -> Any:
        names = [f.name for f in dataclasses.fields(one) if f.name not in keep]
        changes = {
            name: value and hostile(value, attack) for name in names if (value := getattr(one, name)) is not None
        }
        changes |= {"watts": {attack: 3.0}, "metrics": one.metrics | {attack: 0.5}, "hyperparameters": {attack: attack}}
        changes |= {"backbone": attack, "task_title": attack}
        return dataclasses.replace(one, **changes)

    (folder,) = findings.folders
    openings = {
        digest: [dataclasses.replace(o, selection_sha256=attack, what=attack, time_s=1e18) for o in found]
        for digest, found in folder.openings.items()
    }
    selections = {
        name: hostile(record, attack) | {"rule": attack, "time_s": attack, "candidates": record["candidates"]}
        for name, record in folder.selections.items()
    }
    facts = dict.fromkeys(
        ("suite", "model", "hardware", "command", "code_revision", "checkpoint_url", "scheduler"), attack
    )
    sweep = {
        **facts,
        "started_s": attack,
        "not_run": [{"task": attack, "method": attack, "shots": 5, "reason": attack}],
    }
    folder = dataclasses.replace(folder, sweep=sweep, openings=openings, selections=selections)
    cells = [entry(one) for one in findings.cells]
    final = next(cell for cell in cells if cell.kind == "final")
    cells.append(dataclasses.replace(final, status="failed", value=None, error=attack, digest="0" * 64, seed=attack))
    found = Findings((folder,), cells, {one.digest: folder for one in cells})
    data = next(iter(findings.datasets.values()))
    assert isinstance(data, Manifest)
    classes = [f"{name}{attack}" for name in data.classes]
    shown = dataclasses.replace(data, classes=classes)
    found.__dict__.update({"datasets": {cells[0].task: shown}, "played": []})  # read from the folder at other times
    return found


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.targets: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.targets |= {value or "" for name, value in attrs if name in ("src", "href")}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """URL of a server, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


@pytest.fixture(scope="module")
def attack(server: tuple[str, list[str]]) -> str:
    return ATTACK.replace("URL", server[0])


@pytest.fixture(scope="module")
def findings(digits_sweep: Path, attack: str) -> Findings:
    return attacked(load_findings(digits_sweep), attack)


@pytest.fixture(scope="module")
def page(findings: Findings) -> str:
    rows = scorecard(findings.cells)
    return render(findings, rows, comparisons(rows))


def test_what_a_ledger_holds_is_text_on_the_page(page: str) -> None:
    found = Tags(page)
    assert not found.tags & {"script", "iframe", "base", "link", "form", "object", "embed"} and found.tags > {
        "svg",
        "img",
    }
    assert not any(name.startswith("on") for name in found.attributes)
    assert all(target.startswith(("#", "data:image/")) for target in found.targets)
    assert page.count("&lt;script&gt;") > 100 and "{{7*7}}" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028]", page)


def test_a_browser_runs_nothing_of_it_and_asks_nobody(page: str, server: tuple[str, list[str]], tmp_path: Path) -> None:
    if find_browser() is None:
        pytest.skip("no Chromium on this machine")
    url, asked = server
    raw = f"<script>{RUN}</script><img src={url}/image onerror=\"{RUN}\"><style>@import '{url}/style';</style>"
    without_policy = re.sub(r"<meta http-equiv.*?>", "", page)
    for name, text, runs in (
        ("escaped", page, False),
        ("policy", page.replace("</main>", f"{raw}</main>"), False),  # had an escape been forgotten
        ("open", without_policy.replace("</main>", f"{raw}</main>"), True),  # and that this test would see it
    ):
        asked.clear()
        (tmp_path / f"{name}.html").write_text(text)
        shown = look((tmp_path / f"{name}.html").as_uri())
        assert "<h2>Scorecard</h2>" in shown
        assert ("<title>RAN</title>" in shown, bool(asked)) == (runs, runs), name


def test_terminal_csv_and_picture_take_it_as_text(findings: Findings, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scorecard(findings.cells)
    print_table(rows)
    print_comparisons(comparisons(rows))
    printed = capsys.readouterr().out
    assert r"\x1b]0;x\x07\u202e\u2028" in printed and not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\u2028]", printed)
    cells = [cell for line in csv.reader(io.StringIO(to_csv(rows))) for cell in line]
    assert (
        not any(cell.startswith(("=", "+", "@")) for cell in cells)
        and sum(cell.startswith("'=1+1") for cell in cells) == 7
    )
    assert picture(rows).startswith(b"\x89PNG")


def test_links_are_read_as_a_browser_reads_them() -> None:
    check_links('<pre>src="http://a" id="x" id="x" href="#nowhere"</pre>')
    for wrong in ("<img src=http://a>", "<a href='#no'>", "<p onclick=x>", "<script>", "<p id=a></p><p id=a></p>"):
        with pytest.raises(RuntimeError, match="links of the page"):
            check_links(wrong)
    assert anchor("/runs/a_b", "sweep") != anchor("/runs/a/b", "sweep") and anchor("a-1.b", "cell") == "cell-a-1.b"


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.j2")), ids=lambda path: path.name)
def test_no_template_switches_escaping_off(path: Path) -> None:
    text = path.read_text().replace(
        '<script>{% include "leaderboard.js" %}</script>', ""
    )  # a file of ours, by its digest
    assert not re.search(r"\|\s*safe\b|autoescape|xmlattr|\bMarkup\b", text)
    assert not re.search(r"=\{\{|<script|\son\w+=|https?://", text)  # a value in an attribute stands in quotes
