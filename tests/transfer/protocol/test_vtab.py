"""VTAB-1k: the counts that the reference's own tests state, its label rules at their edges, and the lists of images."""

import json

import pytest

from pipeline.data.sources.cards import load_card
from pipeline.errors import UserError
from transfer.protocol.method_settings import VTAB_IMAGES
from transfer.protocol.vtab import (
    TASKS,
    clevr_distance,
    dsprites_orientation,
    kitti_distance,
    score,
    write_list,
)
from transfer.report.html_tables import scorecard_table
from transfer.report.write_report import print_table
from transfer.results.scorecard import Row
from transfer.results.vtab_score import vtab_scores

# Classes, train, val, test: num_classes and expected_num_samples of google-research/task_adaptation, data/*_test.py.
OFFICIAL = {
    "vtab_caltech101": (102, 2754, 306, 6084),
    "vtab_cifar100": (100, 45_000, 5000, 10_000),
    "vtab_dtd": (47, 1880, 1880, 1880),
    "vtab_flowers102": (102, 1020, 1020, 6149),
    "vtab_pets": (37, 2944, 736, 3669),
    "vtab_svhn": (10, 65_931, 7326, 26_032),
    "vtab_sun397": (397, 76_128, 10_875, 21_750),
    "vtab_patch_camelyon": (2, 262_144, 32_768, 32_768),
    "vtab_eurosat": (10, 16_200, 5400, 5400),
    "vtab_resisc45": (45, 18_900, 6300, 6300),
    "vtab_retinopathy": (5, 35_126, 10_906, 42_670),
    "vtab_clevr_count": (8, 63_000, 7000, 15_000),
    "vtab_clevr_distance": (6, 63_000, 7000, 15_000),
    "vtab_dmlab": (6, 65_550, 22_628, 22_735),
    "vtab_kitti_distance": (4, 6347, 423, 711),
    "vtab_dsprites_location": (16, 589_824, 73_728, 73_728),
    "vtab_dsprites_orientation": (16, 589_824, 73_728, 73_728),
    "vtab_smallnorb_azimuth": (18, 24_300, 12_150, 12_150),
    "vtab_smallnorb_elevation": (9, 24_300, 12_150, 12_150),
}


def test_the_nineteen_tasks_have_the_official_classes_and_counts() -> None:
    found = {name: (task.num_classes, *task.counts().values()) for name, task in TASKS.items()}
    assert found == OFFICIAL
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8]


@pytest.mark.parametrize("name", TASKS)
def test_800_of_train_200_of_val_and_all_of_test_do_not_meet(name: str) -> None:
    bounds = TASKS[name].bounds_1k()
    assert [high - low for _, low, high in bounds.values()] == [800, 200, OFFICIAL[name][3]]
    for part, (split, low, high) in bounds.items():
        assert 0 <= low < high <= TASKS[name].official[split]
        assert all(split != s or high <= a or b <= low for p, (s, a, b) in bounds.items() if p != part)


def test_val_begins_where_the_reference_cuts_train() -> None:
    assert TASKS["vtab_caltech101"].bounds_1k()["val"] == ("train", 2754, 2954)
    assert TASKS["vtab_eurosat"].bounds_1k() == {
        "train": ("train", 0, 800),
        "val": ("train", 16_200, 16_400),
        "test": ("train", 21_600, 27_000),
    }
    assert TASKS["vtab_smallnorb_azimuth"].bounds_1k()["val"] == ("test", 0, 200)
    assert TASKS["vtab_clevr_count"].bounds_1k()["test"] == ("validation", 0, 15_000)  # its test has no labels


@pytest.mark.parametrize("name", TASKS)
def test_the_card_of_a_task_agrees_with_it(name: str) -> None:
    card, task = load_card(name), TASKS[name]
    assert dict(card.splits) == {"train": 800, "val": 200, "test": OFFICIAL[name][3]}
    assert (card.num_classes, card.metric, card.test_split) == (task.num_classes, "top1", "test")
    assert (card.label_rule is None) == (task.rule is None) and card.split_rule
    assert card.flip == task.flip or name == "vtab_svhn"  # digits: HyperRule mirrors them all the same


def test_distances_are_cut_as_the_reference_cuts_them() -> None:
    cases = [([12, 7.9], 0), ([8.0], 0), ([8.01], 1), ([8.5], 1), ([9.3, 9.7], 3), ([9.9], 4), ([10.1, 11], 5)]
    assert [clevr_distance(depths) for depths, _ in cases] == [label for _, label in cases]
    # The cases of kitti_test.py, then the edges.
    assert kitti_distance([(0, 1.0)]) == 0 and kitti_distance([(0, 10.0)]) == 1 and kitti_distance([(0, 30.0)]) == 2
    assert kitti_distance([(4, 30.0)]) == 3 and kitti_distance([(0, 30.0), (1, 1.0)]) == 0
    assert kitti_distance([]) == 3 and kitti_distance([(2, 8.0)]) == 0 and kitti_distance([(2, 20.0), (3, 1.0)]) == 1


def test_angles_fall_into_sixteen_bins_of_two_and_a_half() -> None:
    bins = [dsprites_orientation(i) for i in range(40)]
    assert bins == [i * 16 // 40 for i in range(40)] and sorted({bins.count(b) for b in bins}) == [2, 3]


def test_a_list_holds_the_first_of_each_part_with_the_tasks_labels(tmp_path) -> None:
    task = TASKS["vtab_kitti_distance"]
    examples = {s: [(f"{s}/{i:05d}.png", [(0, float(i % 40))]) for i in range(n)] for s, n in task.official.items()}
    out = tmp_path / "kitti.jsonl"
    assert write_list(task, examples, out) == {"train": 800, "val": 200, "test": 711}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 1711 and rows[799] == {"path": "train/00799.png", "label": 2, "split": "train"}
    assert rows[800] == {"path": "validation/00000.png", "label": 0, "split": "val"}
    assert rows[-1] == {"path": "test/00710.png", "label": 2, "split": "test"}


def test_a_class_that_the_800_lack_keeps_its_index(tmp_path) -> None:
    import yaml
    from PIL import Image

    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.sources.cards import datasets_dir

    content = yaml.safe_load((datasets_dir() / "vtab_sun397.yaml").read_text()) | {"num_classes": 12, "splits": {}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content))
    rows = [("train", 0), ("train", 11), ("val", 2), ("test", 10), ("test", 2)]
    for number, (split, label) in enumerate(rows):
        Image.new("RGB", (8, 8), (number, label, 0)).save(tmp_path / f"{number}.png")
        with (tmp_path / "list.jsonl").open("a") as file:
            file.write(json.dumps({"path": f"{number}.png", "label": label, "split": split}) + "\n")
    card = load_card(str(tmp_path / "few.yaml"))
    manifest = prepare(card, str(tmp_path / "out"), source=str(tmp_path / "list.jsonl"))
    found = {split: sorted(manifest.split(split).label.tolist()) for split in manifest.splits}
    assert found == {"train": [0, 11], "val": [2], "test": [2, 10]} and len(manifest.classes) == 12
    with (tmp_path / "list.jsonl").open("a") as file:
        file.write(json.dumps({"path": "0.png?", "label": 12, "split": "test"}) + "\n")
    with pytest.raises(UserError, match=r"test has classes that the card vtab_sun397 lacks \(12, 1 in all;"):
        prepare(card, str(tmp_path / "other"), source=str(tmp_path / "list.jsonl"))


def test_a_list_from_other_data_is_refused(tmp_path) -> None:
    task = TASKS["vtab_pets"]
    examples = {split: [("a.jpg", 36)] * num for split, num in task.official.items()}
    with pytest.raises(UserError, match=r"all 3,680 examples of the official split train, in order.*got 3,679"):
        write_list(task, {**examples, "train": examples["train"][1:]}, tmp_path / "x")
    with pytest.raises(UserError, match="split test"):
        write_list(task, {"train": examples["train"]}, tmp_path / "x")
    with pytest.raises(UserError, match="37 classes from 0"):
        write_list(task, {**examples, "test": [("b.jpg", 37)] * 3669}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_score_is_the_mean_over_tasks_and_not_over_groups() -> None:
    accuracies = {name: {"natural": 0.7, "specialized": 0.8, "structured": 0.5}[t.group] for name, t in TASKS.items()}
    found = score(accuracies)
    assert found["all"] == pytest.approx((7 * 0.7 + 4 * 0.8 + 8 * 0.5) / 19) and found["structured"] == pytest.approx(
        0.5
    )
    del accuracies["vtab_svhn"]
    with pytest.raises(UserError, match="vtab_svhn is missing"):
        score(accuracies)


def test_a_scorecard_has_the_score_of_each_seed_and_none_while_tasks_are_missing(tmp_path, capsys) -> None:
    # 0.7, 0.8, 0.5 a group, plus a hundredth a seed: the score moves by that, and its interval is of the seeds.
    level = {"natural": 0.7, "specialized": 0.8, "structured": 0.5}
    rows = [
        Row(
            task=name,
            task_title=name,
            method="hyperrule",
            shots=VTAB_IMAGES,
            metric="top1",
            pretrained=None,
            scratch=None,
            gain=None,
            verdict="wins",
            num_failed=0,
            protocol_digest="p",
            backbone="f0",
            values=({seed: level[task.group] + seed / 100 for seed in range(3)}, {0: 0.25}),
        )
        for name, task in TASKS.items()
    ]
    ours, scratch = vtab_scores(rows)
    assert (ours.start, scratch.start) == ("f0", "from scratch, as f0")
    mean = ours.groups["all"]
    assert mean.mean == pytest.approx((7 * 0.7 + 4 * 0.8 + 8 * 0.5) / 19 + 0.01) and mean.n == 3
    assert mean.half_width == pytest.approx(0.01 / 3**0.5 * 4.302653, rel=1e-2)  # Student's t, 2 degrees of freedom
    assert scratch.groups["structured"].mean == 0.25 and scratch.groups["all"].half_width is None
    print_table(rows)
    assert (
        "VTAB-1k score of f0 by hyperrule: 64.7 [62.2, 67.1] % over 19 tasks (natural 71.0" in capsys.readouterr().out
    )
    assert "64.7" in scorecard_table(rows)
    fewer = vtab_scores(rows[1:])
    assert [(one.groups, one.num_tasks) for one in fewer] == [({}, 18), ({}, 18)]
    print_table(rows[1:])
    assert "18 of 19 tasks are there" in capsys.readouterr().out
