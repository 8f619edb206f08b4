"""The scorecard's rules on a ledger made up for the purpose, and a page that stands alone."""

import csv
import hashlib
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.transfer.records import selection_json, sweep_json
from transfer.report.html_curves import learning
from transfer.report.write_report import print_table, write_report
from transfer.results.scorecard import scorecard
from transfer.results.sweep_results import load_entries, load_findings
from transfer.sweep.entry import LedgerEntry

TASKS = {"cifar10": "CIFAR-10", "flowers": "Flowers", "signdigits": "Sign digits"}
EVIL = "<script>alert('1')</script>"


def trial(**changed: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "kind": "final",
        "task": "cifar10",
        "task_title": "CIFAR-10",
        "method": "ridge",
        "init": "pretrained",
        "shots": 5,
        "seed": 0,
        "metric": "top1",
        "value": 0.5,
        "num_train": 50,
        "num_test": 1000,
        "hyperparameters": {"penalty": 1024.0},
        "history": [],
        "seconds_s": 2.0,
        "images_seen": 1050,
        "protocol_digest": "a1b2c3d4e5f6a1b2",
        "checkpoint_url": "/runs/c100/checkpoints/9",
        "checkpoint_digest": "c4ec4",
        "data_digest": "da7a",
        "status": "ok",
        "error": None,
    } | changed
    key = [fields[k] for k in ("kind", "task", "method", "init", "shots", "seed", "protocol_digest", "value")]
    return {"digest": hashlib.sha256(json.dumps(key).encode()).hexdigest(), **fields}


def write_ledger(folder: Path, trials: list[dict[str, Any]], **sweep: Any) -> Path:
    for part in ("trials", "selection"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for one in trials:
        (folder / "trials" / f"{one['digest']}.json").write_text(json.dumps(one))
    (folder / "sweep.json").write_text(sweep_json(**sweep))
    return folder


def whole_ledger(folder: Path, num_seeds: int = 3) -> Path:
    """What a sweep over three tasks leaves, with a failure, a thing not run, and names that want to be code."""
    random.seed(1)
    trials: list[dict[str, Any]] = []
    for number, (task, title) in enumerate(TASKS.items()):
        for method, top in (("ridge", 0.45), ("finetune", 0.55)):
            for init, bonus in (("pretrained", 0.22 - 0.14 * number), ("scratch", 0.0)):
                common = {"task": task, "task_title": title, "method": method, "init": init, "data_digest": task * 2}
                for place, shots in enumerate((1, 5, 10, 25)):
                    level = top + bonus - 0.3 / (place + 1)
                    for seed in range(num_seeds):
                        history = [
                            {"step": s, "time_s": 1.7e9 + s, "loss": 2.3 * 0.93 ** (s / (2 - bonus)), "accuracy": 0.5}
                            for s in range(0, 60, 3)
                        ]
                        value = level + random.gauss(0, 0.015)
                        more = {"history": history if method == "finetune" else [], "seconds_s": 8.0}
                        trials.append(trial(**common, **more, shots=shots, seed=seed, value=value))
                    if method == "finetune":
                        rows = []
                        for n in range(4):
                            settings = {"learning_rate": 0.01 * 3**n, "num_steps": 100}
                            score = level - 0.05 * abs(n - 2)
                            search = {"kind": "search", "seed": n, "value": score, "hyperparameters": settings}
                            trials.append(trial(**common, **search, shots=shots))
                            step = 25 if n == 0 else 100  # the first is stopped early
                            row = {"hyperparameters": settings, "score": score, "status": "ok", "step": step}
                            rows.append(row)
                        record = {"hyperparameters": {"learning_rate": 0.09}, "candidates": rows, "time_s": 1.7e9}
                        name = f"{task}-{method}-{init}-{shots}.json"
                        (folder / "selection").mkdir(parents=True, exist_ok=True)
                        (folder / "selection" / name).write_text(selection_json(**record))
    trials.append(
        trial(
            task="flowers",
            task_title="Flowers",
            data_digest="flowers" * 2,
            seed=7,
            status="failed",
            value=None,
            error=EVIL,
        )
    )
    return write_ledger(
        folder,
        trials,
        suite="small_images",
        checkpoint_url="s3://ada:secret@bucket/runs/c100/checkpoints/9",
        checkpoint_digest="c4ec4" * 12,
        model=f"nfnet_tiny {EVIL}",
        started_s=1.7e9,
        command="normfree transfer s3://ada:secret@bucket/runs/c100 --suite small_images",
        hardware="2 cores",
        num_seeds=num_seeds,
        not_run=[
            {"task": "flowers", "shots": 100, "method": "ridge", "reason": f"a class has only 80 images {EVIL}"},
            {"task": "pets", "shots": None, "method": "", "reason": "not prepared; prepare it with: normfree ..."},
        ],
    )


def cells_of(tmp_path: Path, *trials: dict[str, Any]) -> list[LedgerEntry]:
    return load_entries(write_ledger(tmp_path, list(trials)))


def pair(seed: int, pretrained: float, scratch: float) -> list[dict[str, Any]]:
    return [trial(seed=seed, value=pretrained), trial(seed=seed, value=scratch, init="scratch")]


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([(0.70, 0.50), (0.72, 0.51), (0.69, 0.50)], "wins"),
        ([(0.50, 0.70), (0.51, 0.72), (0.50, 0.69)], "loses"),
        ([(0.70, 0.50), (0.40, 0.51), (0.69, 0.50)], "no clear difference"),
        ([(0.99, 0.10)], "one pair"),
        # Far apart among the seeds, but each pair agrees: this is what pairing is for.
        ([(0.90, 0.80), (0.50, 0.41), (0.20, 0.09)], "wins"),
    ],
)
def test_the_verdict_follows_the_paired_interval(tmp_path: Path, values: list[Any], verdict: str) -> None:
    (row,) = scorecard(cells_of(tmp_path, *(t for seed, (a, b) in enumerate(values) for t in pair(seed, a, b))))
    assert row.verdict == verdict
    assert row.gain is not None and row.gain.n == len(values)
    assert row.gain.mean == pytest.approx(sum(a - b for a, b in values) / len(values))


def test_search_trials_and_failures_do_not_enter_the_means(tmp_path: Path) -> None:
    search = trial(kind="search", value=0.99, seed=5)
    failed = trial(seed=1, status="failed", value=None, error="out of memory")
    (row,) = scorecard(cells_of(tmp_path, *pair(0, 0.6, 0.5), search, failed))
    assert row.pretrained is not None and (row.pretrained.mean, row.pretrained.n) == (0.6, 1)
    assert row.num_failed == 1 and row.verdict == "one pair"


@pytest.mark.parametrize(
    "other, word",
    [
        ({"protocol_digest": "ffff"}, "protocols"),
        ({"data_digest": "ffff"}, "data"),
        ({"checkpoint_digest": "ffff"}, "checkpoints"),
        ({"seed": 0}, "twice"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path: Path, other: dict[str, Any], word: str) -> None:
    cells = cells_of(tmp_path, *pair(0, 0.6, 0.5), trial(**{"seed": 1, "value": 0.7, **other}))
    with pytest.raises(UserError, match=word):
        scorecard(cells)


def test_a_ledger_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished trial under"):
        load_entries(tmp_path)
    broken = write_ledger(tmp_path, [trial()])
    (broken / "trials" / "x.json").write_text('{"digest": "x"}')
    with pytest.raises(UserError, match=r"x\.json is not usable: at digest"):
        load_entries(broken)
    (broken / "trials" / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json is cut short"):
        load_entries(broken)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = whole_ledger(tmp_path_factory.mktemp("sweep"))
    paths = write_report(folder, folder / "report", show=False)
    return {kind: Path(path) for kind, path in paths.items()}


def test_the_page_stands_alone_and_escapes_what_comes_from_data(report: dict[str, Path]) -> None:
    page = report["html"].read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!["']?#)[^\s>]+""", page)
    assert not re.findall(r"url\((?!#)[^)]*\)|@import|<link|<script|<iframe|<img", page)
    assert EVIL not in page and "&lt;script&gt;" in page
    assert "secret" not in page and "s3://bucket/runs/c100" in page
    assert page.count("<svg") == 1 + 6 + 12  # the summary, a curve for each task and method, learning curves
    for fact in (
        "Pretraining wins ",
        "after Holm&#39;s correction over the 24 rows",
        "prefers-color-scheme",
        "Failed trials",
        "<td class=t>pets</td><td>all</td><td class=n></td><td>not prepared; prepare it with",
    ):
        assert fact in page
    assert "var(--pretrained)" in page and "#010204" not in page


def test_searches_are_drawn_over_steps_where_they_were_measured_at_several(tmp_path: Path) -> None:
    def searched(rate: float, init: str, *accuracies: float) -> dict[str, Any]:
        history = [{"step": 10 * i, "time_s": 1.0, "loss": 1.0, "accuracy": a} for i, a in enumerate(accuracies, 1)]
        settings = {"learning_rate": rate, "num_steps": 30}
        common = {"method": "finetune", "kind": "search", "init": init, "hyperparameters": settings, "history": history}
        return trial(**common, value=accuracies[-1], selection=f"cifar10-finetune-{init}-5", seed=int(100 * rate))

    finals = [trial(method="finetune", init=i, selection=f"cifar10-finetune-{i}-5") for i in ("pretrained", "scratch")]
    lines = [searched(rate, init, 0.2, 0.4, 0.5) for rate in (0.1, 0.3) for init in ("pretrained", "scratch")]
    folder = write_ledger(tmp_path, [*finals, *lines])
    for init in ("pretrained", "scratch"):
        record = {"hyperparameters": {"learning_rate": 0.3, "num_steps": 30}, "candidates": []}
        (folder / "selection" / f"cifar10-finetune-{init}-5.json").write_text(selection_json(**record))
    drawn = learning(load_findings(folder), ["pretrained"])
    assert drawn.count("<svg") == 1 and "top-1 accuracy, %" in drawn and "search, held-out part" in drawn
    thick = re.findall(r"stroke: var\(--(\w+)\); stroke-width: 1.8", drawn)
    thin = re.findall(r"stroke: var\(--(\w+)\); stroke-opacity: 0.4; stroke-linecap", drawn)
    assert sorted(thin) == ["pretrained", "scratch"]
    assert sorted(thick) == ["pretrained", "scratch"]
    # One evaluation at the end of each is no curve.
    short = [searched(r, "scratch", 0.2) for r in (0.1, 0.3)]
    assert learning(load_findings(write_ledger(tmp_path / "short", [*finals, *short])), ["pretrained"]) == ""


def test_the_page_and_the_table_say_the_same_as_the_csv(report: dict[str, Path]) -> None:
    lines = list(csv.DictReader(io.StringIO(report["csv"].read_text())))
    assert len(lines) == 3 * 2 * 4
    stream = io.StringIO()
    print_table(scorecard(load_findings(report["csv"].parents[1]).cells), stream)
    for line in lines:
        gain = 100 * float(line["gain_mean"])
        assert f"{gain:+.1f} ± " in stream.getvalue()
        assert f"{gain:+.1f}".replace("-", "−") in report["html"].read_text()
    assert "no clear difference" in stream.getvalue() and "1 failed" in stream.getvalue()


def test_the_picture_is_a_picture(report: dict[str, Path]) -> None:
    from PIL import Image

    with Image.open(report["png"]) as image:
        assert image.format == "PNG" and image.width > 900


def test_one_seed_and_one_task_make_a_page_too(tmp_path: Path) -> None:
    folder = write_ledger(tmp_path, pair(0, 0.6, 0.5))
    paths = write_report(folder, tmp_path / "out", show=False)
    page = Path(paths["html"]).read_text()
    assert "No verdict at 5 images a class yet" in page and "[" not in page.split("<tbody>")[1].split("</tbody>")[0]
    assert "1</b><span>task<" in page and "1</b><span>seed a cell<" in page and "largest gain" in page
    loss = write_report(write_ledger(tmp_path / "b", pair(0, 0.5, 0.6)), tmp_path / "b_out", show=False)
    assert "largest gain" not in Path(loss["html"]).read_text()
