"""Scores without the test images that are upstream, against a count by hand; files that fit no task are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.data.verify.overlap import Overlap, Pair
from pipeline.errors import UserError
from transfer import metrics
from transfer.measurement import predictions
from transfer.report.write_report import write_report
from transfer.results.contamination import cleaned, read_overlaps
from transfer.results.sweep_results import Findings, load_findings, name_of_test_split

SEEN = (0, 5, 17, 400)
"""Places of the test images that are said to be upstream."""


def keys(findings: Findings) -> list[str]:
    data = findings.datasets["digits"]
    assert not isinstance(data, str)
    return [str(key) for key in data.split(name_of_test_split(data)).keys]


def write(findings: Findings, path: Path, *, split: str = "val", more: tuple[str, ...] = ()) -> Path:
    """As `normfree data overlap --out` does; one image has two pairs."""
    names = [keys(findings)[place] for place in (*SEEN, SEEN[1])] + list(more)
    pairs = tuple(Pair(f"up{i}", name, 0, "bytes", "train", split) for i, name in enumerate(names))
    found = Overlap(pairs, 9, len(keys(findings)), len(SEEN), len(pairs), 0, 0)
    path.write_bytes(found.to_json() if path.suffix == ".json" else found.to_csv())
    return path


@pytest.mark.parametrize("name", ["digits.csv", "o.json"])
def test_scores_without_upstream_images_are_those_of_a_count_by_hand(
    digits_sweep: Path, tmp_path: Path, name: str
) -> None:
    findings = load_findings(digits_sweep)
    upstream = read_overlaps([str(write(findings, tmp_path / name))], findings)["digits"]
    assert upstream.samples.tolist() == list(SEEN) and upstream.share == len(SEEN) / len(keys(findings))
    rows = {row.cell: row for row in cleaned(findings, upstream)}
    for cell, entries in findings.by_cell().items():
        without, only = [], []
        for entry in entries:
            found = predictions.read(str(digits_sweep), entry.digest)
            right = {
                int(s): int(p == t) for s, p, t in zip(found["sample"], found["predicted"], found["label"], strict=True)
            }
            only.append(sum(right[s] for s in SEEN) / len(SEEN))
            without.append(sum(v for s, v in right.items() if s not in SEEN) / (len(right) - len(SEEN)))
        row = rows[cell]
        assert row.without is not None and row.only is not None and row.whole is not None and row.change is not None
        assert row.without.mean == pytest.approx(np.mean(without)) and row.only.mean == pytest.approx(np.mean(only))
        assert row.change.mean == pytest.approx(row.without.mean - row.whole.mean) and row.change.n == 3


def test_the_page_shows_them_by_task(digits_sweep: Path, tmp_path: Path) -> None:
    file = write(load_findings(digits_sweep), tmp_path / "o.csv")
    text = Path(write_report(digits_sweep, tmp_path / "r", overlaps=[f"digits={file}"], show=False)["html"]).read_text()
    assert "Overlap with upstream" in text and f"{len(SEEN)} of 697 test images (0.57 %)" in text


@pytest.mark.parametrize("metric", ["top1", "top5", "mean_per_class", "balanced_accuracy"])
def test_metrics_from_predictions_are_those_from_scores(tmp_path: Path, metric: str) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 8)), rng.integers(0, 7, 60)
    predictions.write(str(tmp_path), "d", np.arange(60), scores, labels)
    keep = rng.random(60) < 0.7
    ours = predictions.recomputed(metric, predictions.read(str(tmp_path), "d"), keep)
    assert ours == pytest.approx(metrics.compute(metric, scores[keep], labels[keep]), abs=1e-12)
    assert predictions.recomputed("auroc", predictions.read(str(tmp_path), "d"), keep) is None


def test_files_that_fit_no_task_are_refused(digits_sweep: Path, tmp_path: Path) -> None:
    findings = load_findings(digits_sweep)
    good = write(findings, tmp_path / "o.csv")
    strange = write(findings, tmp_path / "strange.csv", more=("no-such-key",))
    train = write(findings, tmp_path / "train.csv", split="train")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "x.json").write_text(json.dumps([1]))
    for words, message in (
        ([f"cifar10={good}"], "no task is called 'cifar10'"),
        ([str(good), str(good)], "digits has a file already"),
        ([str(strange)], "names 1 images that val of"),
        ([str(train)], "is about train of its second dataset; compare with --split-b val"),
        ([str(tmp_path / "x.csv")], "is not what 'normfree data overlap' writes"),
        ([str(tmp_path / "x.json")], "it needs a mapping and has a list; give what 'normfree data overlap' writes"),
        ([str(tmp_path / "none.csv")], "no file"),
    ):
        with pytest.raises(UserError, match=message):
            read_overlaps(words, findings)
    (tmp_path / "empty.csv").write_text(good.read_text().splitlines()[0] + "\n")
    assert read_overlaps([str(tmp_path / "empty.csv")], findings)["digits"].share == 0.0  # nothing found is an answer


def test_a_key_that_a_spreadsheet_would_compute_is_text_in_the_file_and_found_again(
    digits_sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = load_findings(digits_sweep)
    manifest = findings.datasets["digits"]
    assert not isinstance(manifest, str)
    index = SimpleNamespace(keys=["=1+1", "-2\t+3", "a"], num_samples=3)
    monkeypatch.setattr(type(manifest), "split", lambda self, name: index)
    for name in ("digits.csv", "digits.json"):
        pairs = tuple(Pair("@up", key, 0, "bytes", "train", "val") for key in ("=1+1", "-2\t+3"))
        found = Overlap(pairs, 9, 2, 2, 2, 0, 0)
        (tmp_path / name).write_bytes(found.to_json() if name.endswith("json") else found.to_csv())
        assert read_overlaps([str(tmp_path / name)], findings)["digits"].samples.tolist() == [0, 1]
    assert b"\n'@up,'=1+1," in (tmp_path / "digits.csv").read_bytes()
