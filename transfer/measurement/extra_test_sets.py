"""What a final trial is measured by besides its own test split: ReaL's labels for the same scores, and further passes.

One pass for each other test set, five for each corruption of the test split. Others are opened as the test split is: for a
selection record that is written, and not before.
"""

from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from pipeline import distributed
from pipeline.data.augment.corruptions import SEVERITIES, corrupt
from pipeline.data.loading.datasets import DataConfig, EvalData
from pipeline.models.backbone import load_backbone
from pipeline.training.evaluate import Scores, evaluate
from pipeline.training.run import Run
from transfer import metrics
from transfer.protocol.imagenet_labels import CORRUPTED, REAL, real_top1
from transfer.protocol.sealed_splits import TestSplit, open_other
from transfer.protocol.tasks import Task

EVAL_BATCH = 64
Corrupted = tuple[str, int] | None
"""Name and severity."""


def numbers(
    task: Task,
    opened: TestSplit,
    *,
    trial: str,
    samples: np.ndarray,
    scores: np.ndarray,
    score: "Score",
) -> dict[str, float]:
    """Top-1 by ReaL's labels, on each other test set, and over corruptions of the test split, as far as the task states them.

    Args:
        opened: of the task's own test split.
        trial: its digest, for the record of the opening.
        samples, scores: (N,) and (N, C), what was said of the test split.
        score: gives scores of all of the task's classes, and labels, of another open test split or of corrupted images.
    """
    found: dict[str, float] = {}
    if task.extra_tests.real_url:
        found[REAL] = real_top1(task.extra_tests.real_url, task.url, opened.name, samples, scores)
    for other in task.extra_tests.others:
        there, labels = score(*open_other(task, other, opened.selection_url, trial=trial))
        found[other.metric] = metrics.compute("top1", there[:, other.columns] if other.columns else there, labels)
    if names := task.extra_tests.corruptions:
        changes = [(name, severity) for name in names for severity in SEVERITIES]
        found[CORRUPTED] = float(np.mean([metrics.compute("top1", *score(task, opened, c)) for c in changes]))
    return found


class Score(Protocol):
    def __call__(
        self, task: Task, opened: TestSplit, corruption: Corrupted = None, /
    ) -> tuple[np.ndarray, np.ndarray]: ...


def scores_of(
    checkpoint_url: str, run: Run, task: Task, test: TestSplit, corruption: Corrupted = None
) -> tuple[np.ndarray, np.ndarray]:
    """(scores (N, C) float32, labels (N,)) of a trained network on an open test split, on its evaluated weights.

    By this process alone: of a trial's ranks the main one asks.
    """
    me, kept = replace(distributed.join(), rank=0, size=1), list[Scores]()
    evaluate(
        load_backbone(checkpoint_url).model.to(me.device),
        EvalData(
            DataConfig(url=task.url, convert_icc=run.data.convert_icc),
            run.augment,
            split=test.name,
            change=partial(corrupt, *corruption) if corruption else None,
        ),
        run.augment,
        world=me,
        batch_size=EVAL_BATCH,
        step=0,
        weights="evaluated",
        bf16=run.engine.precision == "bf16",
        on_scores=kept.append,
    )
    return kept[0].logits, kept[0].labels
