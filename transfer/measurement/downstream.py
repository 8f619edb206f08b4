"""How a trial's trained network serves other datasets: few-shot ridge on its frozen features, nothing chosen.

`SHOTS` images a class are fitted and `HELD` are scored, both of the dataset's train split, so no other test split is opened. The
penalty is the published, fixed one (`RidgeSettings.l2`). The score is the card's own metric. Fine-tuning on a dataset is what
an experiment with `first` measures.
"""

from functools import partial

import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.sampling.subset import Subset, select
from pipeline.errors import UserError
from transfer import metrics
from transfer.probes.features import extract
from transfer.probes.fit import fit, grid
from transfer.protocol.method_settings import RidgeSettings
from transfer.protocol.methods import Method
from transfer.protocol.tasks import Task, TaskEntry, open_task

SHOTS = HELD = 10
PREFIX = "downstream_"
METHOD = Method(name="ridge", kind="ridge", settings=RidgeSettings(shots=(SHOTS,)))


def open_downstream(card: str, data_root: str) -> Task:
    """UserError where it is not prepared, or too small."""
    task = open_task(TaskEntry(card=card, holdout_per_class=HELD), data_root)
    if (reason := task.truth.cannot(METHOD.settings, SHOTS, task.metric(METHOD.settings), task.name)) is not None:
        raise UserError(f"{task.url} does not serve as downstream: {reason}")
    if task.fewest < SHOTS + HELD:
        raise UserError(
            f"{task.url} has {task.fewest} training images of its smallest class, and downstream takes {SHOTS + HELD}; "
            "choose another dataset"
        )
    return task


def downstream(network: torch.nn.Module, card: str, augment: AugmentConfig, data_root: str, *, seed: int) -> float:
    """By the card's metric; `seed` draws the images that are fitted."""
    task = open_downstream(card, data_root)
    part = partial(Subset, per_class=SHOTS, seed=seed, holdout_per_class=HELD)
    features, labels = extract(network, task, augment, task.train_split)
    fitted, held = (select(task.truth.strata(labels), part(part=which)) for which in ("support", "holdout"))
    scorer = fit(
        METHOD, grid(METHOD, len(fitted)), features[fitted], task.truth.of(labels[fitted]), task.num_classes, seed=0
    )
    return metrics.compute(task.metric(METHOD.settings), next(scorer(features[held])), task.truth.of(labels[held]))
