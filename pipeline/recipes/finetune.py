"""Fine-tuning on ImageNet what `pipeline.recipes.large_scale` pretrained: Brock et al. 2021, A.5, and Smith et al. 2023.

Neither states clipping, label smoothing, augmentation or the NFNets' resolution in fine-tuning. Taken here: AGC as on
ImageNet, label smoothing 0.1 where the recipe regularises and 0 where it does not, crop and flip as in pretraining, the
network's own sizes.
"""

from dataclasses import replace

from nfnet.variants import get_variant
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.recipes.recipe import IMAGENET, Recipe
from pipeline.training.run import Run

GLOBAL_BATCH = 2048


def _finetuning(name: str, model: str, *, init_from: str, image_px: int, eval_px: int) -> Run:
    """15,000 steps, regularised as the paper's NFNets are."""
    return Run(
        name=name,
        model=ModelConfig(
            name=model,
            options={"drop_rate": 0.25, "stochastic_depth": 0.1},
            init_from=init_from,
            new_head=True,
        ),
        data=DataConfig(num_workers=8),
        augment=AugmentConfig(image_px=image_px, eval_px=eval_px, crop="area", flip=True, eval_resize="published"),
        optim=OptimConfig(
            learning_rate=0.1,
            warmup=Duration(5000, "steps"),
            weight_decay=1e-5,
            clipping=0.01,
            ema_decay=0.9999,
            label_smoothing=0.1,
            sam_rho=0.05,
        ),
        engine=EngineConfig(precision="bf16", zero_stage=1),
        global_batch=GLOBAL_BATCH,
        micro_batch=16,
        duration=Duration(15_000, "steps"),
        eval_every=Duration(2500, "steps"),
        save_every=Duration(500, "steps"),
    )


def without_regularisation(run: Run) -> Run:
    """The paper's setting for ResNets: no weight decay, dropout, stochastic depth, SAM, nor (here) label smoothing."""
    optim = replace(run.optim, weight_decay=0.0, sam_rho=0.0, label_smoothing=0.0)
    return replace(run, model=replace(run.model, options={}), optim=optim)


def nfnet_f4_plus_imagenet_finetune() -> Run:
    """NFNet-F4+ fine-tuned on ImageNet, 15,000 steps with SAM (Brock et al. 2021, A.5)

    Command:  normfree data prepare imagenet --source ILSVRC2012/ --out data/imagenet
              normfree pretrain nfnet_f4_plus_imagenet_finetune --data.url data/imagenet \\
                  --model.init_from s3://BUCKET/runs/nfnet_f4_plus_300m --out runs/f4_plus --num-processes 8
    Hardware: not stated; 30.7M images, each also in SAM's ascent by a fifth; not run here
    Result:   top-1 89.2 % (table 5) from weights pretrained on JFT-300M
    Choices:  the resolution is not stated: trained at F4's own 384 px, evaluated at its 512 px, where the paper counts its 367
              billion multiply-adds. The average's decay is stated for ResNets only (0.9999); in 15,000 steps its warm-up
              decides alone. Clipping, label smoothing, augmentation: see pipeline/recipes/finetune.py
    """
    own = get_variant("nfnet_f4_plus")
    return _finetuning(
        "nfnet_f4_plus_imagenet_finetune",
        "nfnet_f4_plus",
        init_from="runs/nfnet_f4_plus_300m",
        image_px=own.train_px,
        eval_px=own.test_px,
    )


def nfnet_f4_plus_imagenet_finetune_plain() -> Run:
    """NFNet-F4+ fine-tuned on ImageNet without any regularisation, as the paper's ResNets are (Brock et al. 2021, A.5)

    Command:  normfree pretrain nfnet_f4_plus_imagenet_finetune_plain --data.url data/imagenet \\
                  --model.init_from s3://BUCKET/runs/nfnet_f4_plus_300m --out runs/f4_plus --num-processes 8
    Hardware: not stated; a fifth cheaper than with SAM, or more; not run here
    Result:   "almost as well" as nfnet_f4_plus_imagenet_finetune, says the paper, and no number
    Choices:  as there
    """
    run = without_regularisation(nfnet_f4_plus_imagenet_finetune())
    return replace(run, name="nfnet_f4_plus_imagenet_finetune_plain")


def nfnet_f7_plus_imagenet_finetune() -> Run:
    """NFNet-F7+ fine-tuned on ImageNet, 50 epochs with SAM and repeated augmentation (Smith et al. 2023)

    Command:  normfree pretrain nfnet_f7_plus_imagenet_finetune --data.url data/imagenet \\
                  --model.init_from s3://BUCKET/runs/nfnet_f7_plus_4b --out runs/f7_plus --num-processes 8
    Hardware: 1,600 core hours of TPUv4 (the paper's); not run here
    Result:   top-1 90.4 % at 480 px; 90.3 % without repeated augmentation: --data.repeats 1 --duration '50 epochs'
    Choices:  each image comes 4 times in its batch, and a quarter of the passes are made, so 12.5 epochs (of 4 views of each
              image) cost what 50 do. Trained at 384 px, stochastic depth, dropout and SAM are stated, their strengths are not,
              nor are rate, batch, decay and average: those of nfnet_f4_plus_imagenet_finetune are taken
    """
    run = _finetuning(
        "nfnet_f7_plus_imagenet_finetune",
        "nfnet_f7_plus",
        init_from="runs/nfnet_f7_plus_4b",
        image_px=384,
        eval_px=480,
    )
    return replace(run, data=replace(run.data, repeats=4), duration=Duration(12.5, "epochs"))


RECIPES = {
    f.__name__: Recipe.of(f, IMAGENET)
    for f in (
        nfnet_f4_plus_imagenet_finetune,
        nfnet_f4_plus_imagenet_finetune_plain,
        nfnet_f7_plus_imagenet_finetune,
    )
}
