"""Rows of a scorecard from entries made up by hand: what is paired, counted, ordered, refused."""

from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from pipeline.errors import UserError
from transfer.metric_facts import facts_of
from transfer.protocol.imagenet_labels import REAL
from transfer.protocol.method_settings import VTAB_IMAGES
from transfer.report import plots
from transfer.report.plot_style import new_figure
from transfer.report.scorecard_csv import from_csv, to_csv
from transfer.results.comparison import comparisons
from transfer.results.scorecard import (
    METHODS,
    cell_name,
    difference_text,
    scorecard,
    shots_order,
    shots_phrase,
    shots_text,
    start_of,
    value_text,
    with_extra_metrics,
)
from transfer.results.scorecard_table import COLUMNS, lines_of, notes
from transfer.results.statistics import Estimate, paired
from transfer.sweep.entry import LedgerEntry


def cell(seed: int, value: float | None, init: Any = "pretrained", **changed: Any) -> LedgerEntry:
    usual = {
        "digest": f"{seed:064x}",
        "kind": "final",
        "task": "digits",
        "task_title": "Digits",
        "method": "ridge",
        "method_kind": "ridge",
        "shots": 5,
        "metric": "top1",
        "num_train": 50,
        "num_test": 100,
        "hyperparameters": {},
        "seconds_s": 1.0,
        "images_seen": 50,
        "protocol_digest": "p",
        "checkpoint_url": "",
        "checkpoint_digest": "c" * 64 if init == "pretrained" else "",
        "backbone_digest": "b" * 64,
        "backbone": "net",
        "data_digest": "d",
        "metrics": {} if value is None else {"top1": value, REAL: value / 2},
        "error": None if value is not None else "the loss is not finite",
        "cause": "" if value is not None else "diverged",
    }
    return LedgerEntry(
        **{
            **usual,
            "seed": seed,
            "value": value,
            "init": init,
            "status": "failed" if value is None else "ok",
            **changed,
        }
    )


PAIRS = [cell(0, 0.5), cell(1, 0.7), cell(0, 0.4, "scratch"), cell(1, 0.5, "scratch")]


def test_a_row_pairs_a_source_with_its_baseline_by_seed_and_counts_what_failed() -> None:
    (row,) = scorecard([*PAIRS, cell(2, None), cell(3, 0.9, kind="search")])
    assert row.pretrained and row.scratch and row.gain
    assert (row.pretrained.mean, row.scratch.mean) == pytest.approx((0.6, 0.45))
    assert row.gain == paired({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.5}) and row.gain.mean == pytest.approx(0.15)
    assert row.values == ({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.5}) and (row.num_failed, row.n) == (1, 2)
    assert (row.task_title, row.method_title, row.metric) == ("Digits", METHODS["ridge"], "top1")
    assert (row.column, row.backbone, row.baseline) == (("digits", "ridge", 5), "net", "b" * 64)
    assert (row.pretrained_cell, row.scratch_cell) == (
        "digits-ridge-pretrained-5-cccccccc",
        "digits-ridge-scratch-5-bbbbbbbb",
    )
    (extra,) = row.extra
    assert extra.metric == REAL and extra.pretrained and extra.pretrained.mean == pytest.approx(0.3)
    assert with_extra_metrics([row]) == [row, extra] and extra.verdict == row.verdict


def test_a_row_has_what_there_is() -> None:
    (row,) = scorecard(PAIRS[:1])
    assert row.scratch is None and row.gain is None and (row.n, row.scratch_cell) == (1, "")
    (row,) = scorecard([*PAIRS, cell(2, 0.9)])
    assert row.n == 2 and row.gain and row.gain.n == 2
    (row,) = scorecard([cell(0, None)])
    assert row.pretrained is None and (row.num_failed, row.n) == (1, 0)
    assert scorecard([]) == []


def test_each_source_has_a_row_with_the_baseline_of_its_architecture() -> None:
    other = {"backbone": "big", "backbone_digest": "e" * 64, "checkpoint_digest": "f" * 64}
    rows = scorecard([*PAIRS, cell(0, 0.9, **other), cell(0, 0.8, "scratch", **{**other, "checkpoint_digest": ""})])
    assert [(r.backbone, r.values) for r in rows] == [
        ("big", ({0: 0.9}, {0: 0.8})),
        ("net", ({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.5})),
    ]


def test_two_sources_of_one_architecture_share_its_baseline() -> None:
    tuned = [cell(0, 0.9, backbone="tuned", checkpoint_digest="f" * 64)]
    scratch = [cell(s, v, "scratch", backbone="untrained") for s, v in ((0, 0.4), (1, 0.5))]
    rows = scorecard([*PAIRS[:2], *tuned, *scratch])
    assert [(r.backbone, r.values) for r in rows] == [
        ("net", ({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.5})),
        ("tuned", ({0: 0.9}, {0: 0.4, 1: 0.5})),
    ]


def test_networks_of_which_none_was_pretrained_have_a_row_each() -> None:
    rows = scorecard([cell(0, v, "scratch", backbone=name) for name, v in (("net", 0.4), ("big", 0.8))])
    assert [(r.backbone, r.values[1]) for r in rows] == [("big", {0: 0.8}), ("net", {0: 0.4})]


def test_of_one_seed_each_side_has_the_interval_of_its_own_test_images() -> None:
    intervals: Any = [{"low": v - 0.1, "high": v + 0.1, "rule": "bootstrap"} for v in (0.7, 0.4)]
    (row,) = scorecard([cell(0, 0.7, test_interval=intervals[0]), cell(0, 0.4, "scratch", test_interval=intervals[1])])
    assert row.pretrained == Estimate(0.7, 1, 0.6, pytest.approx(0.8), "bootstrap")
    assert row.scratch == Estimate(0.4, 1, pytest.approx(0.3), 0.5, "bootstrap")
    (extra,) = row.extra  # by another metric the interval is not known
    assert extra.pretrained == Estimate(0.35, 1) and extra.scratch == Estimate(0.2, 1)


def test_a_plot_of_another_metric_than_the_one_on_its_left_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(
        plots, "new_figure", lambda *size, **how: figures.append(made := new_figure(*size, **how)) or made
    )
    for metric in ("mean_per_class", "top1"):
        others = [replace(c, task="x", metric=metric, metrics={metric: c.value or 0.0}) for c in PAIRS]
        plots.picture(scorecard([*PAIRS, *others]))
    labels = [[axes.get_ylabel() for axes in figure.axes] for figure, _ in figures]
    assert labels == [["top-1 accuracy, %", "mean accuracy of the classes, %"], ["top-1 accuracy, %", ""]]


def test_rows_are_ordered_by_task_cost_of_the_method_and_shots() -> None:
    kinds = list(METHODS)
    cells = [
        cell(0, 0.5, task=task, method=f"m{kind}", method_kind=kind, shots=shots)
        for task in "ba"
        for kind in [*kinds[:1:-1], "of another version", kinds[0]]
        for shots in (0, VTAB_IMAGES, 25, 5)
    ]
    expected = [(t, f"m{k}") for t in "ab" for k in [kinds[0], *kinds[2:], "of another version"] for _ in range(4)]
    rows = scorecard(cells)
    assert [(r.task, r.method) for r in rows] == expected
    assert [r.shots for r in rows][:2] == [5, 25] and {r.shots for r in rows[2:4]} == {0, VTAB_IMAGES}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"protocol_digest": "q"}, r"digits, ridge, 5 images a class: trials of different protocols \(p, q\)"),
        ({"data_digest": "D" * 20}, r"trials of different data \(DDDDDDDDDDDD, d\)"),
        ({"metric": "auroc"}, "trials of different metrics"),
        ({"checkpoint_digest": "a" * 64}, "trials of different checkpoints"),
        ({"seed": 1}, "seed 1 of pretrained is there twice"),
    ],
)
def test_trials_that_do_not_compare_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        scorecard([*PAIRS, cell(**{"seed": 2, "value": 0.5, **changed})])
    assert scorecard([*PAIRS, cell(**{**changed, "seed": 2, "value": None})])  # what has no result mixes nothing


def test_what_is_known_of_a_cell_is_shown_with_its_row() -> None:
    name = cell_name(PAIRS[0])
    (row,) = scorecard(PAIRS, {name: "a candidate is lost", "another": "x"})
    assert row.damage == "net: a candidate is lost"
    (row,) = scorecard([*PAIRS, cell(2, None, "scratch", cause="lost", error="its process died")], {name: "b"})
    assert row.damage == "net from scratch: its process died; net: b"


def test_names_of_cells_and_starts() -> None:
    assert cell_name(cell(0, 0.5, selection="mine")) == "mine"
    assert cell_name(cell(0, 0.5, checkpoint_digest="", backbone_digest="")) == "digits-ridge-pretrained-5"
    assert start_of(cell(0, 0.5, backbone="")) == "pretrained" and start_of(PAIRS[0]) == "net"
    assert start_of(PAIRS[2]) == "net from scratch" and start_of(cell(0, 0.5, "scratch", backbone="")) == "from scratch"


def test_shots_and_shares_in_words() -> None:
    assert [shots_phrase(n) for n in (1, 5, 0, VTAB_IMAGES)] == [
        *("1 image a class", "5 images a class", "all images", "VTAB's 1,000 images"),
    ]
    assert [shots_text(n) for n in (1, 0, VTAB_IMAGES)] == ["1", "all", "VTAB"]
    assert [shots_order(n) for n in (1, 0, VTAB_IMAGES)] == [1, float("inf"), float("inf")]
    one, many = Estimate(0.7244, 1), Estimate(-0.0244, 3, -0.0425, -0.0063, "t")
    top1, area = facts_of("top1"), facts_of("auroc")
    assert value_text(one, top1) == "72.4" and value_text(one, area) == "0.724" and value_text(None, top1) == "-"
    assert difference_text(many, top1) == "-2.4 ± 1.8" and difference_text(many, area) == "-0.024 ± 0.018"
    assert value_text(Estimate(0.72, 3, 0.7, 0.74, "logit t"), top1) == "72.0 [70.0, 74.0]"


FIXED = {"shots": 0, "method": "knn", "method_kind": "knn", "metrics": {}}


def test_a_value_where_nothing_is_drawn_is_one_value_with_the_interval_of_its_test_images() -> None:
    drawn = [cell(s, v, "scratch", **FIXED) for s, v in enumerate((0.4, 0.5, 0.45))]
    interval: Any = {"low": 0.6, "high": 0.8, "rule": "bootstrap"}
    (row,) = scorecard([cell(0, 0.7, **FIXED, test_interval=interval), *drawn])
    assert row.pretrained == Estimate(0.7, 1, 0.6, 0.8, "bootstrap")
    # Against each from-scratch network it is a pair of its own.
    assert row.gain == paired(dict.fromkeys(range(3), 0.7), {0: 0.4, 1: 0.5, 2: 0.45}) and row.n == 3
    (old,) = scorecard([*(cell(s, 0.7, **FIXED) for s in range(3)), *drawn])  # earlier versions ran it three times
    low, high = (0.7 + 2 * 0.9604 / 100 + s * 1.959964 * (0.21 / 100 + 0.9604 / 1e4) ** 0.5 for s in (-1, 1))
    wide = 1 + 4 * 0.9604 / 100
    assert old.pretrained and old.pretrained.n == 1 and old.pretrained.rule == "wilson"
    assert (old.pretrained.low, old.pretrained.high) == pytest.approx((low / wide, high / wide), abs=1e-5)
    assert (old.gain, old.values[0]) == (row.gain, {0: 0.7})


def test_wins_are_corrected_over_the_rows_of_the_table_and_what_guessing_reaches_is_marked() -> None:
    def task(name: str, *gains: float, value: float = 0.5) -> list[LedgerEntry]:
        known: dict[str, Any] = {"task": name, "metrics": {}, "baselines": {"chance": 0.1, "majority": 0.55}}
        ours = [cell(s, value + g, **known) for s, g in enumerate(gains)]
        return ours + [cell(s, value, "scratch", **known) for s in range(len(gains))]

    clear, close = task("a", 0.1, 0.11, 0.1), task("b", 0.1, 0.13, 0.07)
    (alone,) = scorecard(close)
    first, second = scorecard([*clear, *close])
    assert (alone.verdict, alone.p_holm) == ("wins", alone.gain.p if alone.gain else None)
    p = [stats.ttest_1samp(gains, 0).pvalue for gains in ([0.1, 0.11, 0.1], [0.1, 0.13, 0.07])]
    assert (first.p_holm, second.p_holm) == pytest.approx((2 * p[0], max(2 * p[0], p[1])), rel=1e-9)
    many = scorecard([*clear, *(e for name in "bcdefgh" for e in task(name, 0.1, 0.13, 0.07))])
    assert (many[1].verdict, many[1].verdict_uncorrected) == ("no clear difference", "wins")
    assert "7 more would have a direction" in " ".join(notes(many))
    assert first.is_below_baseline(first.scratch) and not first.is_below_baseline(first.pretrained)
    assert [line.text(COLUMNS[6])[-1] == "†" for line in lines_of([first])] == [True]
    assert from_csv(to_csv(many)) == [replace(row, values=({}, {}), method_title="", baseline="") for row in many]


def test_points_of_accuracy_are_never_averaged_with_another_metric() -> None:
    rows = scorecard([*PAIRS, *(replace(c, task="x", metric="auroc", metrics={}) for c in PAIRS)])
    assert [(v.family, v.tasks) for v in comparisons(rows)] == [
        ("accuracy", ("digits",)),
        ("area under the ROC curve", ("x",)),
    ]
