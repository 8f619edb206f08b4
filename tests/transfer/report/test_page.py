"""The page of real sweeps: links that lead somewhere, nothing from outside, numbers that lead to their records."""

import html
import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from tests.transfer.records import edit_entry
from transfer.measurement import predictions
from transfer.report.html_page import check_links
from transfer.report.html_template import record
from transfer.report.write_report import write_report
from transfer.results.comparison import SCRATCH, comparisons
from transfer.results.error_analysis import confusion, worst_mistakes
from transfer.results.scorecard import scorecard
from transfer.results.search_effects import main_effects, whole_candidates
from transfer.results.sweep_results import load_findings
from transfer.results.trial_records import check_lineage
from transfer.sweep.entry import LedgerEntry

VOID = {"meta", "img", "br", "path", "use", "link"}


class Balanced(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()


@pytest.fixture(scope="module")
def page(digits_sweep: Path, more_sweeps: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report")
    return Path(write_report([digits_sweep, more_sweeps[0]], out, show=False)["html"]).read_text()


def test_the_page_is_well_formed_and_asks_for_nothing(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:image/(?:png|jpeg);base64,)""", page)
    assert not re.findall(r"url\((?!#)|@import|<script|<link|<iframe|https?://", page)


def test_a_link_that_leads_nowhere_is_no_page(page: str) -> None:
    check_links(page)
    assert page.count('href="#cell-') > 12
    for broken in (page.replace('id="cell-', 'id="no-', 1), page.replace("<h2>", '<a href="other.html"><h2>', 1)):
        with pytest.raises(RuntimeError, match="links of the page"):
            check_links(broken)


def test_a_record_is_whole_json_with_a_line_for_each_candidate_and_harmless() -> None:
    evil = {"c": 0.1, "</pre><script>alert('1')</script>": "\"&'"}
    content = {
        "task": "x",
        "hyperparameters": {"c": 0.1},
        "none": [],
        "numbers": [1, 2],
        "candidates": [evil, {"c": 1}],
    }
    shown = record(content)
    assert json.loads(html.unescape(shown)) == content
    assert len(shown.splitlines()) == 2 + len(content) + 2 + 1  # braces, fields, candidates, their bracket
    assert "<script" not in shown and "</pre>" not in shown and "&quot;" not in shown
    assert "secret" not in record({"url": "s3://user:secret@bucket/x"})


def test_each_selection_record_is_on_the_page_as_it_was_written(page: str, digits_sweep: Path) -> None:
    shown = [json.loads(html.unescape(text)) for text in re.findall(r"<pre>(\{.*?)</pre>", page, re.DOTALL)]
    records = [json.loads(path.read_text()) for path in (digits_sweep / "selection").iterdir()]
    assert len(records) == 6 and all(record in shown for record in records)


def test_confusions_are_tinted_by_the_style_and_a_short_variable(page: str) -> None:
    style, rest = page.split("</style>", 1)
    assert "color-mix(in srgb, var(--of) calc(var(--s) * 1%), transparent)" in style and "color-mix" not in rest
    shares = re.findall(r'<td class="(hit|miss)" style="--s:(\d+)">(\d+)</td>', rest)
    assert {kind for kind, *_ in shares} == {"hit", "miss"}
    assert all(abs(int(tint) - 0.6 * int(share)) <= 0.8 for _, tint, share in shares)


def test_each_number_leads_to_its_records(page: str, digits_sweep: Path) -> None:
    cells = load_findings(digits_sweep).by_cell()
    assert len(cells) == 3 * 2 and all(len(entries) == 3 for entries in cells.values())
    for name, entries in cells.items():
        assert f'id="cell-{name}"' in page and f"{digits_sweep} --rerun {name}" in page
        first = entries[0]
        for digest in (first.data_digest, first.protocol_digest, first.checkpoint_digest or first.backbone_digest):
            assert digest in page
        assert all(f"predictions/{e.digest}.npz" in page and f"trials/{e.digest}.json" in page for e in entries)
    assert "the test split was opened 3 times" in page and page.count("data:image/png") >= 1


@pytest.mark.parametrize("part", ["selection", "predictions", "openings"])
def test_a_record_that_is_gone_stops_the_report(digits_sweep: Path, tmp_path: Path, part: str) -> None:
    check_lineage(load_findings(digits_sweep))
    copy = shutil.copytree(digits_sweep, tmp_path / "s")
    gone = sorted((copy / part).iterdir())[0]
    gone.unlink()
    with pytest.raises(UserError, match=part):
        write_report(copy, tmp_path / "out", show=False)
    assert not (tmp_path / "out").exists()


def test_data_that_are_gone_or_others_leave_a_sentence(digits_sweep: Path, tmp_path: Path, digits: str) -> None:
    for root, words in ((tmp_path, "there is no dataset at"), (Path(digits).parent, "")):
        text = Path(write_report(digits_sweep, tmp_path / "o", data_root=str(root), show=False)["html"]).read_text()
        assert ("No pictures: " + words in text) is bool(words)
    other = shutil.copytree(Path(digits).parent, tmp_path / "data")
    manifest = json.loads((other / "digits" / "manifest.json").read_text())
    (other / "digits" / "manifest.json").write_text(json.dumps({**manifest, "digest": "0" * 64}))
    found = load_findings(digits_sweep, data_root=str(other)).datasets["digits"]
    assert isinstance(found, str)  # a manifest that does not verify, or another digest


def test_sweeps_by_one_protocol_stand_side_by_side(
    digits_sweep: Path, more_sweeps: tuple[Path, Path], page: str
) -> None:
    joint = load_findings(digits_sweep, more_sweeps[0])
    rows, alone = scorecard(joint.cells), scorecard(load_findings(digits_sweep).cells)
    assert len(rows) == 2 * len(alone) and {row.backbone for row in rows} == {"pixels (cccccc)", "pixels (dddddd)"}
    assert [r.pretrained for r in rows if "cccccc" in r.backbone] == [r.pretrained for r in alone]
    assert joint.num_shared == 3  # the baseline's cells are in both, and are shown once
    assert "Sources side by side" in page and "pixels (dddddd)" in page
    kinds = {(v.a, v.b) for v in comparisons(rows)}
    assert kinds == {("pixels (cccccc)", "pixels (dddddd)"), *((f"pixels ({d * 6})", SCRATCH) for d in "cd")}


def test_a_cell_comes_whole_from_the_folder_with_most_of_its_seeds(digits_sweep: Path, tmp_path: Path) -> None:
    fewer = shutil.copytree(digits_sweep, tmp_path / "s")
    for path in (fewer / "trials").iterdir():
        entry = json.loads(path.read_text())
        if entry["seed"] == 2:
            path.unlink()
        else:
            edit_entry(path, value=0.0)
    joint = load_findings(fewer, digits_sweep)
    assert joint.num_shared == len(joint.by_cell()) == 6
    assert {e.digest: e.value for e in joint.finals} == {e.digest: e.value for e in load_findings(digits_sweep).finals}


def test_protocols_are_not_mixed_and_the_difference_is_named(
    digits_sweep: Path, more_sweeps: tuple[Path, Path]
) -> None:
    with pytest.raises(
        UserError, match=r"digits, ridge, 1 image a class: .*protocols .*differ in l2 \(1024.0 and 1.0\)"
    ):
        load_findings(digits_sweep, more_sweeps[1])


def test_tasks_count_once_each_in_a_comparison() -> None:
    def final(task: str, init: str, seed: int, value: float) -> LedgerEntry:
        fields = dict.fromkeys(("data_digest", "checkpoint_url", "protocol_digest", "task_title"), "")
        return LedgerEntry(
            digest=f"{task}{init}{seed}", kind="final", task=task, method="ridge", init=init, shots=5, seed=seed, metric="top1",
            value=value, num_train=1, num_test=1, hyperparameters={}, seconds_s=1, images_seen=1, status="ok",
            checkpoint_digest="c" if init == "pretrained" else "", **fields,
        )  # fmt: skip

    values = {"a": ([0.5, 0.7], [0.4, 0.4]), "b": ([0.3], [0.5, 0.3]), "c": ([0.2], [0.2])}
    cells = [
        final(task, init, seed, value)
        for task, sides in values.items()
        for init, seeds in zip(("pretrained", "scratch"), sides, strict=True)
        for seed, value in enumerate(seeds)
    ]
    (versus,) = comparisons(scorecard(cells))
    result = versus.result
    assert (result.difference.n, result.wins, result.ties, result.losses) == (3, 1, 1, 1)
    assert result.difference.mean == pytest.approx((0.2 - 0.1 + 0.0) / 3)


def test_the_confusion_is_the_predictions_counted() -> None:
    one = {"label": np.array([0, 0, 1, 2]), "predicted": np.array([0, 1, 1, 0])}
    two = {"label": np.array([0, 0, 1, 2]), "predicted": np.array([1, 1, 1, 0])}
    found = confusion([one, two], 4)
    assert found.counts.tolist() == [[1, 3, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
    assert found.recalls[:3].tolist() == [0.25, 1.0, 0.0] and np.isnan(found.recalls[3])
    assert found.worst_pairs(5) == [(2, 0, 1.0), (0, 1, 0.75)]


def test_the_worst_mistakes_are_wrong_with_every_seed_and_the_surest_first() -> None:
    common = {"sample": np.array([3, 5, 8]), "label": np.array([0, 1, 2])}
    a = {**common, "predicted": np.array([1, 0, 2]), "confidence": np.array([0.5, 0.9, 1.0])}
    b = {**common, "predicted": np.array([2, 0, 0]), "confidence": np.array([0.7, 0.8, 1.0])}
    found = worst_mistakes([a, b], 12)
    assert [(m.sample, m.label, m.predicted) for m in found] == [(5, 1, 0), (3, 0, 2)]
    assert [m.confidence for m in found] == pytest.approx([0.85, 0.6]) and len(worst_mistakes([a, b], 1)) == 1


def test_pictures_are_the_images_that_the_predictions_speak_of(digits_sweep: Path) -> None:
    findings = load_findings(digits_sweep)
    manifest = findings.datasets["digits"]
    assert not isinstance(manifest, str)
    labels = manifest.split("val").label
    for entry in findings.finals:
        found = predictions.read(str(digits_sweep), entry.digest)
        assert np.array_equal(labels[found["sample"]], found["label"])
        assert entry.value == pytest.approx((found["label"] == found["predicted"]).mean(), abs=2e-3)  # ties are shared


def test_what_mattered_is_the_range_of_means_over_a_hyperparameters_values() -> None:
    points = [({"rate": r, "steps": s}, 0.5 + 0.1 * r + 0.01 * s) for r in (1, 2, 4) for s in (1, 2)]
    assert main_effects(points) == pytest.approx({"rate": 0.3, "steps": 0.01})
    assert list(main_effects(points)) == ["rate", "steps"] and main_effects(points[:1]) == {}


def test_candidates_that_were_stopped_early_are_not_scores() -> None:
    whole = {"hyperparameters": {"num_steps": 9}, "score": 0.5, "step": 9, "status": "ok"}
    probe = {"hyperparameters": {"num_steps": 9, "learning_rate": 1}, "score": 0.6, "step": 0, "status": "ok"}
    record = {"candidates": [whole, {**whole, "step": 3}, {**whole, "status": "failed", "score": None}, probe]}
    num, scores = whole_candidates(record)
    assert num == 4 and [score for _, score in scores] == [0.5, 0.6] and whole_candidates({}) == (0, [])
