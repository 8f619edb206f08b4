"""What a final trial is measured by besides its own test split: ReaL's labels for the same scores, ImageNet-V2 in one more pass.

Both are opened as the test split is: for a selection record that is written, and not before.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline import distributed
from pipeline.data.loading.datasets import DataConfig, EvalData
from pipeline.models.backbone import load_backbone
from pipeline.training.evaluate import Scores, evaluate
from pipeline.training.run import Run
from transfer import metrics
from transfer.protocol.imagenet_labels import REAL, V2, real_top1
from transfer.protocol.sealed_splits import TestSplit, open_v2
from transfer.protocol.tasks import Task

EVAL_BATCH = 64


def numbers(
    task: Task,
    opened: TestSplit,
    *,
    trial: str,
    samples: np.ndarray,
    scores: np.ndarray,
    score: Callable[[Task, TestSplit], tuple[np.ndarray, np.ndarray]],
) -> dict[str, float]:
    """`real_top1` and `v2_top1`, as far as the task states them.

    Args:
        opened: of the task's own test split.
        trial: its digest, for the record of the opening.
        samples, scores: (N,) and (N, C), what was said of the test split.
        score: gives scores and labels of another dataset's open test split.
    """
    found: dict[str, float] = {}
    if task.extra_tests.real_url:
        found[REAL] = real_top1(task.extra_tests.real_url, task.url, opened.name, samples, scores)
    if task.extra_tests.v2_url:
        found[V2] = metrics.compute("top1", *score(*open_v2(task, opened.selection_url, trial=trial)))
    return found


def scores_of(checkpoint_url: str, run: Run, task: Task, test: TestSplit) -> tuple[np.ndarray, np.ndarray]:
    """(scores (N, C) float32, labels (N,)) of a trained network on an open test split, on its evaluated weights.

    By this process alone: of a trial's ranks the main one asks.
    """
    me, kept = replace(distributed.join(), rank=0, size=1), list[Scores]()
    evaluate(
        load_backbone(checkpoint_url).model.to(me.device),
        EvalData(DataConfig(url=task.url), run.augment, split=test.name),
        run.augment,
        world=me,
        batch_size=EVAL_BATCH,
        step=0,
        weights="evaluated",
        bf16=run.engine.precision == "bf16",
        on_scores=kept.append,
    )
    return kept[0].logits, kept[0].labels
