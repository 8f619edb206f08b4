"""Smoke variants: any recipe shrunk until a CPU runs it in seconds, by one function, so that none can drift from its recipe.

What stays: loss, optimiser, clipping, SAM, averages, the kinds of augmentation, repeats, precision, ZeRO stage, the shape of the
schedule (warm-up and periods keep their share of the run). What shrinks: network, images, batch, steps; with them the strength
of RandAugment and the learning rate.
"""

from dataclasses import replace
from functools import partial

from nfnet.variants import get_variant
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.duration import Duration
from pipeline.recipes.recipe import Recipe
from pipeline.training.run import Run

SUFFIX = "_tiny"
STEPS, BATCH, MICRO_BATCH, PX = 20, 16, 8, 16
RATE = 0.05
"""Peak rate where the recipe's is that of 0.1 * batch / 256; others keep their ratio to it."""

HEADER = """Smoke variant of {name}: {model} at {px} px, {steps} steps of {batch} images

Command:  normfree data prepare digits --out data/digits
          normfree pretrain {name}_tiny --data.url data/digits \\
              --out runs/{name}_tiny
Hardware: seconds on one core of any CPU
Result:   that the recipe runs from end to end; no number"""

AFTER = """
Choices:  begins with the weights in {source}, which the smoke variant of that name leaves there"""


def shrink(run: Run, num_images: int) -> Run:
    """The smoke variant of `run`, whose durations are given for `num_images` training images."""
    per_epoch = num_images * run.data.repeats

    def steps(duration: Duration) -> int:
        return duration.steps(samples_per_epoch=per_epoch, global_batch=run.global_batch)

    def shorter(duration: Duration) -> Duration:
        return Duration(max(1, round(STEPS * steps(duration) / steps(run.duration))), "steps")

    by_rule = 0.1 * run.global_batch / 256
    source = run.model.init_from
    return replace(
        run,
        name=f"{run.name}{SUFFIX}",
        model=replace(
            run.model,
            name=f"{get_variant(run.model.name).family}{SUFFIX}",
            init_from=f"{source}{SUFFIX}" if source else None,
        ),
        data=replace(run.data, num_workers=0, mix_blocks=16, block_mb=0.01),
        augment=_smaller(run.augment),
        optim=replace(
            run.optim,
            learning_rate=_plain(RATE * run.optim.learning_rate / by_rule),
            final_learning_rate=_plain(RATE * run.optim.final_learning_rate / by_rule),
            warmup=shorter(run.optim.warmup),
        ),
        global_batch=BATCH,
        micro_batch=MICRO_BATCH,
        duration=Duration(STEPS, "steps"),
        eval_every=None,
        save_every=None,
    )


def _smaller(augment: AugmentConfig) -> AugmentConfig:
    share = PX / augment.image_px
    return replace(
        augment,
        image_px=PX,
        eval_px=8 * round(augment.evaluation_px * share / 8),
        policy_magnitude=_plain(augment.policy_magnitude * (share if augment.policy == "nfnet" else 1)),
    )


def _plain(number: float) -> float:
    """Without the last digits, which only say in what order it was computed: 0.05 and not 0.05000000000000001."""
    return float(f"{number:.9g}")


def smoke_variant(name: str, recipe: Recipe) -> Recipe:
    run = _make(recipe)
    header = HEADER.format(name=name, model=run.model.name, px=PX, steps=STEPS, batch=BATCH)
    return Recipe(
        make=partial(_make, recipe),
        header=header + (AFTER.format(source=run.model.init_from) if run.model.init_from else ""),
        num_images=recipe.num_images,
    )


def _make(recipe: Recipe) -> Run:
    return shrink(recipe.make(), recipe.num_images)
