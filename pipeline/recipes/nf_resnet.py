"""NF-ResNet-50 to 200: on ImageNet from scratch as the released code trains, on 300M images and then ImageNet as Brock et
al. 2021, A.5, compare them with their batch-normalised counterparts (table 4)."""

from dataclasses import replace
from functools import partial

from nfnet.optim.schedule import linear_scaling
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.recipes.finetune import nfnet_f4_plus_imagenet_finetune, without_regularisation
from pipeline.recipes.recipe import JFT_300M, PREPARE_IMAGENET, Recipe
from pipeline.training.run import Run

GLOBAL_BATCH = 1024
CROP_AND_FLIP = AugmentConfig(image_px=224, eval_px=224, crop="area", flip=True, eval_resize="aspect")
"""Evaluated as the released code does for these: the centre, 224/256 of the shorter side."""
TABLE_4 = {
    50: (79.5, 80.9, 81.1, 78.1),
    101: (81.4, 82.7, 83.2, 80.8),
    152: (82.7, 83.6, 84.0, 81.8),
    200: (82.9, 84.1, 84.3, 81.8),
}
"""Top-1 on ImageNet after 300M images at 224, 320 and 384 px; the batch-normalised network's at 224 px."""

IMAGENET_HEADER = """NF-ResNet-{layers} on ImageNet from scratch, 90 epochs at 224 px (released code, experiment.py)

Command:  {prepare}
          normfree pretrain {name} --data.url data/imagenet --out runs/{name} --num-processes 8
Hardware: not stated; not run here
Result:   not known for these settings: those are the code's, and the tables of its paper (Brock et al. 2021a) were not at hand
Choices:  no clipping, which is younger than these networks; crop and flip; fp32, as the code"""

LARGE_HEADER = """NF-ResNet-{layers} on 300M images, 10 epochs at 224 px (Brock et al. 2021, A.5)

Command:  normfree pretrain {name} --data.url s3://BUCKET/upstream \\
              --out s3://BUCKET/runs/{name}
Hardware: not stated; not run here
Result:   top-1 {at_224} % on ImageNet after {name_after} (table 4; batch-normalised:
          {bn} %), on JFT-300M, which is not public
Choices:  clipping is not stated for them: AGC by the paper's 0.01 for batches from 1024. The rest as nfnet_f4_plus_300m"""

FINETUNE_HEADER = """NF-ResNet-{layers} fine-tuned on ImageNet, 15,000 steps without regularisation (Brock et al. 2021, A.5)

Command:  normfree pretrain {name} --data.url data/imagenet \\
              --model.init_from s3://BUCKET/runs/{name_before} --out runs/{name} --num-processes 8
Hardware: not stated; not run here
Result:   top-1 {at_224} % at 224 px (table 4); in runs of their own {at_320} % at 320 px and {at_384} % at 384 px:
          --augment.image_px 320 --augment.eval_px 320
Choices:  see pipeline/recipes/finetune.py"""


def _imagenet(layers: int) -> Run:
    return Run(
        name=f"nf_resnet{layers}_imagenet",
        model=ModelConfig(name=f"nf_resnet{layers}", options={"stochastic_depth": 0.1}),
        data=DataConfig(num_workers=8),
        augment=CROP_AND_FLIP,
        optim=OptimConfig(
            learning_rate=linear_scaling(0.1, GLOBAL_BATCH),
            warmup=Duration(5, "epochs"),
            weight_decay=1e-4,
            clipping=0.0,
            label_smoothing=0.1,
        ),
        engine=EngineConfig(precision="fp32", zero_stage=1),
        global_batch=GLOBAL_BATCH,
        micro_batch=32,
        duration=Duration(90, "epochs"),
        eval_every=Duration(5, "epochs"),
        save_every=Duration(1, "epochs"),
    )


def _large(layers: int) -> Run:
    return Run(
        name=f"nf_resnet{layers}_300m",
        model=ModelConfig(name=f"nf_resnet{layers}"),
        data=DataConfig(num_workers=8, order="lanes", block_mb=4.0, cache_gb=0),
        augment=CROP_AND_FLIP,
        optim=OptimConfig(learning_rate=0.4, warmup=Duration(5000, "steps"), weight_decay=1e-5, clipping=0.01),
        engine=EngineConfig(precision="bf16", zero_stage=1),
        global_batch=GLOBAL_BATCH,
        micro_batch=32,
        duration=Duration(10, "epochs"),
        eval_every=Duration(20_000, "steps"),
        save_every=Duration(5000, "steps"),
    )


def _finetune(layers: int) -> Run:
    run = without_regularisation(nfnet_f4_plus_imagenet_finetune())
    model = ModelConfig(name=f"nf_resnet{layers}", init_from=f"runs/nf_resnet{layers}_300m", new_head=True)
    return replace(run, name=f"nf_resnet{layers}_imagenet_finetune", model=model, augment=CROP_AND_FLIP, micro_batch=32)


def _recipes(layers: int) -> dict[str, Recipe]:
    at_224, at_320, at_384, bn = TABLE_4[layers]
    large, after = f"nf_resnet{layers}_300m", f"nf_resnet{layers}_imagenet_finetune"
    numbers = {"layers": layers, "at_224": at_224, "at_320": at_320, "at_384": at_384, "bn": bn}
    return {
        f"nf_resnet{layers}_imagenet": Recipe(
            make=partial(_imagenet, layers),
            header=IMAGENET_HEADER.format(name=f"nf_resnet{layers}_imagenet", prepare=PREPARE_IMAGENET, **numbers),
        ),
        large: Recipe(
            make=partial(_large, layers),
            header=LARGE_HEADER.format(name=large, name_after=after, **numbers),
            num_images=JFT_300M,
        ),
        after: Recipe(
            make=partial(_finetune, layers),
            header=FINETUNE_HEADER.format(name=after, name_before=large, **numbers),
        ),
    }


RECIPES = {name: recipe for layers in TABLE_4 for name, recipe in _recipes(layers).items()}
