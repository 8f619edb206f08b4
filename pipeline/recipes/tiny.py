"""Recipes for `nfnet_tiny` at 32 px: the demo and the real-image run that two CPU cores can do."""

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.recipes.recipe import Recipe
from pipeline.training.run import Run


def nfnet_tiny_glyphs() -> Run:
    """Characters rendered from fonts, the upstream task of `make demo`.

    Command:  normfree data prepare glyphs --out DATA/glyphs
              normfree pretrain nfnet_tiny_glyphs --data.url DATA/glyphs --out RUN
    Hardware: two cores of an AMD EPYC: 2 min 20 s at about 440 images/s
    Result:   top-1 52.0 %, top-5 80.1 % of 325 classes on val (averaged weights, one seed)
    """
    return Run(
        name="nfnet_tiny_glyphs",
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(),
        augment=AugmentConfig(image_px=32, crop="area", area_min=0.5, flip=False),
        optim=OptimConfig(
            learning_rate=0.3,
            warmup=Duration(0.5, "epochs"),
            weight_decay=2e-5,
            clipping=0.02,
            ema_decay=0.998,
            label_smoothing=0.1,
        ),
        global_batch=128,
        duration=Duration(3, "epochs"),
        save_every=Duration(1, "epochs"),
    )


def nfnet_tiny_cifar100() -> Run:
    """CIFAR-100 (a part of it: 200 images a class), the upstream task of the committed scorecard.

    Command:  normfree data prepare cifar100 --source cifar100.tar --out DATA/cifar100
              normfree pretrain nfnet_tiny_cifar100 --data.url DATA/cifar100 --out RUN
    Hardware: one core of an AMD EPYC (OMP_NUM_THREADS=1): 45 min 37 s at 250 images/s; two cores reach about 410 images/s
    Result:   top-1 53.1 %, top-5 81.2 % on its val split of 4,000 images (averaged weights, one seed)
    """
    return Run(
        name="nfnet_tiny_cifar100",
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(),
        augment=AugmentConfig(image_px=32, crop="area", area_min=0.25, flip=True),
        optim=OptimConfig(
            learning_rate=0.3,
            warmup=Duration(2, "epochs"),
            weight_decay=5e-5,
            clipping=0.02,
            ema_decay=0.999,
            label_smoothing=0.1,
        ),
        global_batch=128,
        duration=Duration(32, "epochs"),
        eval_every=Duration(4, "epochs"),
        save_every=Duration(2, "epochs"),
    )


RECIPES = {
    "nfnet_tiny_glyphs": Recipe.of(nfnet_tiny_glyphs, 19_500),
    "nfnet_tiny_cifar100": Recipe.of(nfnet_tiny_cifar100, 20_000),
}
