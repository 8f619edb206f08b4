"""Full fine-tuning of a checkpoint with a new head, and its from-scratch twin at equal budget: a Run for THE loop.

The twins differ in one field, `model.init_from`: same steps, batch, augmentation, optimiser, schedule and search
space. The head starts at zero in both, so the first update moves the head alone and the trunk is not shaken by a
random one. SGD with Nesterov momentum and AGC, warm-up over a tenth, cosine to zero; no EMA, because tens of steps
are too few to average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.backbone import ModelConfig
from pipeline.config import Run
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.data.subset import Subset
from pipeline.duration import Duration
from pipeline.update import OptimConfig
from transfer.spaces import grace_steps
from transfer.splits import open_test, read_selection
from transfer.tasks import FinetuneSettings, Task

MAX_LOG_POINTS = 10


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint under test: what trials need to know of it."""

    checkpoint_url: str
    digest: str
    model: str
    options: dict[str, Any]
    augment: AugmentConfig
    """Of pretraining: resolution and normalisation carry over."""

    def backbone_options(self) -> dict[str, Any]:
        """Options that shape the network; what regularised pretraining is off on a few images."""
        return {k: v for k, v in self.options.items() if k not in ("drop_rate", "stochastic_depth", "head_init")}


def finetune_augment(source: Source, task: Task, settings: FinetuneSettings) -> AugmentConfig:
    """Pretraining's resolution and normalisation; crops by area, and mirroring where the task allows it."""
    return source.augment.crop_and_flip(crop="area", area_min=settings.area_min, area_max=1.0, flip=task.card.flip)


def finetune_run(
    source: Source,
    task: Task,
    settings: FinetuneSettings,
    *,
    init: str,
    shots: int,
    seed: int,
    hyperparameters: Mapping[str, Any],
    selection_url: str | None,
) -> Run:
    """The Run of one trial.

    Args:
        hyperparameters: learning_rate and num_steps, a point of `transfer.spaces.candidates`.
        selection_url: None for a search trial, which is scored on the held-out part of the train split; the URL of the
            cell's selection record for a final one, which is scored on the test split.
    Raises:
        UserError: no selection record lies at `selection_url`, or it chose other hyper-parameters.
    """
    if selection_url is None:
        eval_split, eval_subset = task.train_split, _subset(task, shots, 0, "holdout")
        eval_every: Duration | None = Duration(grace_steps(settings), "steps")
    else:
        chosen = read_selection(selection_url).hyperparameters
        if chosen != dict(hyperparameters):
            raise ValueError(f"{selection_url} chose {chosen}, the trial has {dict(hyperparameters)}")
        eval_split, eval_subset, eval_every = open_test(task, selection_url).name, None, None
    num_steps = int(hyperparameters["num_steps"])
    return Run(
        name=f"{task.name}-{init}-{shots}-shots-seed-{seed}",
        seed=seed,
        model=ModelConfig(
            name=source.model,
            options={**source.backbone_options(), "head_init": "zero"},
            init_from=source.checkpoint_url if init == "pretrained" else None,
            new_head=True,
        ),
        data=DataConfig(
            url=task.url,
            train_split=task.train_split,
            eval_split=eval_split,
            subset=_subset(task, shots, seed, "support"),
            eval_subset=eval_subset,
        ),
        augment=finetune_augment(source, task, settings),
        optim=OptimConfig(
            learning_rate=float(hyperparameters["learning_rate"]),
            warmup=Duration(max(1, num_steps // 10), "steps"),
            weight_decay=settings.weight_decay,
            clipping=settings.clipping,
        ),
        global_batch=min(settings.batch, shots * task.num_classes),
        duration=Duration(num_steps, "steps"),
        eval_every=eval_every,
        save_every=None,
        log_every_steps=max(1, num_steps // MAX_LOG_POINTS),
        save_final=False,
    )


def _subset(task: Task, shots: int, seed: int, part: Any) -> Subset:
    return Subset(per_class=shots, seed=seed, holdout_per_class=task.holdout_per_class, part=part)
