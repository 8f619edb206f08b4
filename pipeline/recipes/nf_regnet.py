"""NF-RegNet-B0 to B5 on ImageNet from scratch, as the released code trains (`experiment_nf_regnets.py`)."""

from functools import partial

from nfnet.variants import get_variant
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.recipes.recipe import PREPARE_IMAGENET, Recipe
from pipeline.training.run import Run

HEADER = """NF-RegNet-B{size} on ImageNet from scratch, 360 epochs at {px} px (released code, experiment_nf_regnets.py)

Command:  {prepare}
          normfree pretrain {name} --data.url data/imagenet --out runs/{name} --num-processes 8
Hardware: not stated; not run here
Result:   not known for these settings: the tables of its paper (Brock et al. 2021a) were not at hand; evaluated at {eval_px} px
Choices:  evaluated on the centre, 0.875 of the shorter side, where the code takes size/(size + 32) of it: equal at 224 px.
          MixUp 0.2 on one half of a batch and CutMix on the other, no policy, no clipping and fp32 are the code's"""


def _from_scratch(size: int) -> Run:
    variant = get_variant(f"nf_regnet_b{size}")
    return Run(
        name=f"nf_regnet_b{size}_imagenet",
        model=ModelConfig(name=variant.name, options={"drop_rate": variant.drop_rate, "stochastic_depth": 0.1}),
        data=DataConfig(num_workers=8),
        augment=AugmentConfig(
            image_px=variant.train_px,
            eval_px=variant.test_px,
            crop="area",
            flip=True,
            mixup_alpha=0.2,
            cutmix_alpha=1.0,
            eval_resize="aspect",
        ),
        optim=OptimConfig(
            learning_rate=0.4,
            warmup=Duration(5, "epochs"),
            final_learning_rate=0.001,
            weight_decay=round(5e-5 + 1e-5 * size, 8),
            clipping=0.0,
            ema_decay=0.99999,
            label_smoothing=0.1,
        ),
        engine=EngineConfig(precision="fp32", zero_stage=1),
        global_batch=1024,
        micro_batch=32,
        duration=Duration(360, "epochs"),
        eval_every=Duration(10, "epochs"),
        save_every=Duration(1, "epochs"),
    )


def _recipe(size: int) -> Recipe:
    run = _from_scratch(size)
    header = HEADER.format(
        size=size,
        name=run.name,
        prepare=PREPARE_IMAGENET,
        px=run.augment.image_px,
        eval_px=run.augment.eval_px,
    )
    return Recipe(make=partial(_from_scratch, size), header=header)


RECIPES = {f"nf_regnet_b{size}_imagenet": _recipe(size) for size in range(6)}
