"""Fine-tuning of a backbone with a new head, and its from-scratch baseline at equal budget: a Run for THE loop.

The two differ in one field, `model.init_from`: same steps, batch, augmentation, optimiser, schedule and search space. The head
starts at zero in both, so the first update moves the head alone and the trunk is not shaken by a random one. The recipe
(`transfer.protocol.methods`) states the rest: one for all backbones (SGD with Nesterov's momentum and AGC unless it says
otherwise), BiT's rule, which derives it from the task, or that of each backbone's own family (`transfer.protocol.recipes`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig, samples_per_epoch
from pipeline.duration import Duration
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import Diverged
from pipeline.models.backbone import ModelConfig
from pipeline.records import Record, Stopped
from pipeline.storage import objects
from pipeline.training.run import Run
from transfer.protocol.method_settings import FinetuneSettings, HyperruleSettings, TeacherStage
from transfer.protocol.methods import Method
from transfer.protocol.recipes.bit_hyperrule import HyperRule, hyperrule
from transfer.protocol.sealed_splits import TestSplit, read_selection
from transfer.protocol.tasks import Part, Task
from transfer.search.grids import at_point, exceptions, image_area, of_family
from transfer.sweep.failures import TrialFailed
from transfer.sweep.sources import REGULARISATION, Backbone, FirstStage

MAX_LOG_POINTS = 10


def at_resolution(augment: AugmentConfig, method: Method) -> AugmentConfig:
    """A backbone's preprocessing at the resolution that the protocol states, if it states one."""
    px = method.settings.image_px
    return dataclasses.replace(augment, image_px=px, eval_px=0, resized_px=0, crop="area") if px else augment


def finetune_augment(source: Backbone, task: Task, method: Method, num_images: int) -> AugmentConfig:
    """The backbone's resolution and normalisation; crops by area, and mirroring where the task allows it."""
    settings, flip = method.settings, task.card.flip
    augment = at_resolution(source.augment, method)
    if isinstance(settings, HyperruleSettings):
        rule = _rule(task, settings, num_images)
        if not settings.resize:
            share = rule.resize_px / rule.crop_px if rule.random_crop else 1.0
            own = augment.image_px
            return _resized(augment, own, round(own * share), rule, flip)
        return _resized(augment, rule.crop_px, rule.resize_px if rule.random_crop else rule.crop_px, rule, flip)
    assert isinstance(settings, FinetuneSettings)
    sizes: dict[str, Any] = {}
    if not settings.area_min:
        return augment.crop_and_flip(crop="none", flip=False, eval_resize="plain")
    if settings.train_px:
        sizes = {"image_px": settings.train_px, "eval_px": augment.evaluation_px}
    cut = augment.crop_and_flip(crop="area", area_min=settings.area_min, area_max=1.0, flip=flip, **sizes)
    if settings.policy_magnitude:
        cut = dataclasses.replace(cut, policy="classic", policy_layers=2, policy_magnitude=settings.policy_magnitude)
    return dataclasses.replace(cut, mixup_alpha=settings.mixup_alpha, cutmix_alpha=settings.cutmix_alpha)


def _resized(augment: AugmentConfig, px: int, resized_px: int, rule: HyperRule, flip: bool) -> AugmentConfig:
    crop: dict[str, Any] = {"crop": "none"}
    if resized_px > px:
        crop = {"crop": "resized", "resized_px": resized_px}
    whole = augment.crop_and_flip(image_px=px, eval_px=0, eval_resize="plain", flip=flip and rule.flip, **crop)
    return dataclasses.replace(whole, mixup_alpha=rule.mixup_alpha)


def _rule(task: Task, settings: HyperruleSettings, num_images: int) -> HyperRule:
    return hyperrule(num_images, image_area(task), variant=settings.variant, **exceptions(task))


def finetune_run(
    source: Backbone,
    task: Task,
    method: Method,
    *,
    init: str,
    shots: int,
    seed: int,
    hyperparameters: Mapping[str, Any],
    test: TestSplit | None,
    eval_every: int = 0,
) -> Run:
    """The Run of one trial.

    Args:
        hyperparameters: learning_rate and num_steps, a point of `transfer.search.grids.candidates`; of a searched space also what
            else of the recipe it searches.
        test: None for a search trial, which is scored on the held-out part of the train split; else permission to be scored on
            the test split (`transfer.protocol.sealed_splits.open_test`).
        eval_every: in steps; 0 = only at the end.
    Raises:
        ValueError: the record that the permission comes from chose other hyper-parameters.
    """
    method = of_family(at_point(method, hyperparameters), task, shots, source.model, source.backbone_options())
    parts = task.parts(method.settings, shots, seed)
    part = parts.search if test is None else parts.final
    num_images = part.num
    if test is not None:
        chosen = read_selection(test.selection_url).hyperparameters
        if chosen != dict(hyperparameters):
            raise ValueError(f"{test.selection_url} chose {chosen}, the trial has {dict(hyperparameters)}")
    settings: Any = method.settings
    num_steps = int(hyperparameters["num_steps"])
    augment = finetune_augment(source, task, method, num_images)
    batch, _ = _batch(settings, augment, num_images)
    options = {**source.backbone_options(), "head_init": "zero"}
    options |= {k: v for k in REGULARISATION[:2] if (v := getattr(settings, k, 0.0))}
    return Run(
        name=f"{task.name}-{method.name}-{init}-{shots}-shots-seed-{seed}",
        seed=seed,
        model=ModelConfig(
            name=source.model,
            options=options,
            init_from=source.checkpoint_url if init == "pretrained" else None,
            new_head=True,
            batch_norm=settings.batch_norm,
        ),
        data=_data(task, part, parts.holdout, test, settings),
        augment=augment,
        optim=_optim(method, task, num_images, hyperparameters),
        global_batch=batch,
        duration=Duration(num_steps, "steps"),
        eval_every=Duration(eval_every, "steps") if eval_every else None,
        log_every_steps=max(1, num_steps // MAX_LOG_POINTS),
        save_final=False,
        keep_checkpoints=1,
        # A rung is left with its checkpoint in place, and what a save costs is measured (`transfer.sweep.trial_ranks.SavePace`).
        saving=SavingConfig(in_background=False),
    )


def first_run(run: Run, first: FirstStage, data_root: str) -> Run:
    """What comes before a trial's run: by its recipe, on images of training alone."""
    data = dataclasses.replace(run.data, eval_split=None, eval_subset=None)
    if first.card:
        data = DataConfig(url=objects.join(data_root, first.card), eval_split=None, convert_icc=data.convert_icc)
    num_steps = max(1, round(first.epochs * samples_per_epoch(data) / run.global_batch))
    share = run.optim.warmup.value / run.duration.value
    decay = run.optim.weight_decay if first.weight_decay is None else first.weight_decay
    warmup = Duration(max(1, int(num_steps * share)), "steps")
    return dataclasses.replace(
        run,
        name=f"{run.name}-first",
        model=dataclasses.replace(run.model, options={**run.model.options, **first.options}),
        data=data,
        optim=dataclasses.replace(run.optim, warmup=warmup, weight_decay=decay),
        duration=Duration(num_steps, "steps"),
        eval_every=None,
        save_every=None,
        save_final=True,
        log_every_steps=max(1, num_steps // MAX_LOG_POINTS),
    )


def teacher_run(run: Run, teacher: TeacherStage) -> Run:
    """What trains a trial's teacher: as a first stage, but another network by a recipe of its own."""
    stage = first_run(run, FirstStage(epochs=teacher.epochs, weight_decay=teacher.weight_decay), "")
    optim = OptimConfig(
        learning_rate=teacher.learning_rate,
        warmup=stage.optim.warmup,
        weight_decay=teacher.weight_decay,
        clipping=teacher.clipping,
    )
    model = ModelConfig(name=teacher.model, options=teacher.options)
    return dataclasses.replace(stage, name=f"{run.name}-teacher", model=model, optim=optim)


def begin_stages(run: Run, method: Method, first: FirstStage | None, root: str, place: str) -> tuple[Run, str]:
    """What comes before a trial, trained here, or before a kill: its run from the weights of its first stage, if it has one, and
    the place of its teacher, or "". A teacher knows the trial's classes, so a first stage on other data has none."""
    teacher, taught = getattr(method.settings, "teacher", None), ""
    if teacher is not None:
        taught = f"{place}-teacher"
        try:
            _train_stage(teacher_run(run, teacher), taught)
        except Diverged as error:  # of this setting, and not a result of the trial's
            raise TrialFailed(f"the teacher diverged ({error}); lower teacher.learning_rate", "error") from None
    if first is None:
        return run, taught
    _train_stage(first_run(run, first, root), f"{place}-first", "" if first.card else taught)
    model = dataclasses.replace(run.model, init_from=f"{place}-first", new_head=bool(first.card))
    return dataclasses.replace(run, model=model), taught


def _train_stage(run: Run, place: str, teacher: str = "") -> None:
    from pipeline.training.train import train

    for record in train(run, place, goes_back=False, teacher=teacher):
        refuse_stop(record)


def refuse_stop(record: Record) -> None:
    if isinstance(record, Stopped):
        raise TrialFailed(f"{record.reason}; the same command again goes on from there", "lost")


def _data(task: Task, part: Part, holdout: Part, test: TestSplit | None, settings: Any) -> DataConfig:
    return DataConfig(
        url=task.url,
        train_split=part.split,
        eval_split=holdout.split if test is None else test.name,
        subset=part.subset,
        eval_subset=holdout.subset if test is None else None,
        repeats=repeats_of(settings, part.num),
        order="correlated" if getattr(settings, "correlated", False) else "windowed",
        convert_icc=settings.convert_icc,
    )


def _optim(method: Method, task: Task, num_images: int, point: Mapping[str, Any]) -> OptimConfig:
    settings, num_steps, rate = method.settings, int(point["num_steps"]), float(point["learning_rate"])
    loss: Literal["softmax", "binary"] = "binary" if task.truth.kind == "several" else "softmax"
    if isinstance(settings, HyperruleSettings):
        rule = _rule(task, settings, num_images)
        share = num_steps / rule.steps
        return OptimConfig(
            name="sgd" if settings.nesterov else "momentum",
            loss=loss,
            learning_rate=rate,
            warmup=Duration(round(rule.warmup_steps * share), "steps"),
            schedule="steps",
            decay_steps=tuple(sorted({max(1, round(s * share)) for s in rule.decay_steps})),
            momentum=rule.momentum,
            weight_decay=rule.weight_decay,
            clipping=settings.clipping,
        )
    assert isinstance(settings, FinetuneSettings)
    return OptimConfig(
        name=settings.optimiser,
        loss=loss,
        learning_rate=rate,
        layer_decay=settings.layer_decay,
        warmup=Duration(max(1, int(num_steps * settings.warmup_share)), "steps"),
        weight_decay=settings.weight_decay,
        clipping=settings.clipping,
        clip=settings.clip,
        clip_norm=settings.clip_norm,
        unclipped=settings.unclipped,
        clip_head=settings.clip_head,
        ema_decay=settings.ema_decay or None,
        label_smoothing=settings.label_smoothing,
        sam_rho=settings.sam_rho,
    )


def repeats_of(settings: Any, num_images: int) -> int:
    """How often an image is in a pass."""
    if isinstance(settings, HyperruleSettings):
        # BiT's batches are of its own size whatever the support: it is gone through again and again within one.
        return max(1, math.ceil(settings.batch / num_images))
    return int(settings.repeats)


def num_processes(source: Backbone, task: Task, method: Method, num_images: int, *, wanted: int) -> int:
    """As how many processes a trial runs where `wanted` may: as many of them as its global batch can be shared by."""
    batch, multiple = _batch(method.settings, finetune_augment(source, task, method, num_images), num_images)
    shares = batch // multiple
    return next(n for n in range(min(wanted, shares), 0, -1) if shares % n == 0)


def _batch(settings: Any, augment: AugmentConfig, num_images: int) -> tuple[int, int]:
    """(samples an update, what they and each process's share of them are a multiple of)."""
    repeats = repeats_of(settings, num_images)
    # A batch holds whole pairs of mixed images, and all copies of an image.
    multiple = math.lcm(augment.micro_batch_multiple, repeats)
    batch = min(settings.batch, num_images * repeats)
    return max(batch // multiple, 1) * multiple, multiple
