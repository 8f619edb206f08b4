"""Pretraining on 300M and 4B labelled images: Brock et al. 2021, A.5, and Smith et al. 2023 ("ConvNets Match Vision
Transformers at Scale").

Their data (JFT) is not public: these are the recipes for a set of that size. What both leave open is decided alike for all:
softmax cross-entropy without label smoothing, no dropout and no stochastic depth (crop and flip are all the regularisation
that they name), AGC as on ImageNet, no averaged weights.
"""

from nfnet.optim.schedule import linear_scaling
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.recipes.recipe import JFT_4B, JFT_300M, Recipe
from pipeline.training.run import Run

GLOBAL_BATCH = 4096
WARMUP = Duration(5000, "steps")


def _pretraining(name: str, model: str, *, epochs: float, learning_rate: float, eval_px: int) -> Run:
    return Run(
        name=name,
        model=ModelConfig(name=model),
        data=DataConfig(num_workers=8, order="lanes", block_mb=4.0, cache_gb=0),
        augment=AugmentConfig(image_px=224, eval_px=eval_px, crop="area", flip=True, eval_resize="published"),
        optim=OptimConfig(learning_rate=learning_rate, warmup=WARMUP, weight_decay=1e-6, clipping=0.01),
        engine=EngineConfig(precision="bf16", zero_stage=1),
        global_batch=GLOBAL_BATCH,
        micro_batch=32,
        duration=Duration(epochs, "epochs"),
        eval_every=Duration(20_000, "steps"),
        save_every=Duration(2000, "steps"),
        keep_checkpoints=3,
    )


def nfnet_f4_plus_300m() -> Run:
    """NFNet-F4+ (527M parameters) on 300M images, 20 epochs at 224 px (Brock et al. 2021, A.5)

    Command:  normfree pretrain nfnet_f4_plus_300m --data.url s3://BUCKET/upstream --out s3://BUCKET/runs/nfnet_f4_plus_300m
    Hardware: 1,860 core days of TPUv3 (table 5); about 830 ms for 32 images on a core; not run here
    Result:   top-1 89.2 % on ImageNet after nfnet_f4_plus_imagenet_finetune (table 5), on JFT-300M, which is not public
    Choices:  warm-up: the paper says for its ResNets here 5,000 steps, and for NFNets only that they inherit the settings of
              ImageNet, whose 5 epochs would be a quarter of this run: 5,000 steps are taken. Loss, label smoothing, dropout
              and stochastic depth are not stated: softmax, and none of the others. Evaluation at 224 px, not stated either.
              On other data begin with --optim.weight_decay 0 and raise it slightly (the paper's advice)
    """
    rate = linear_scaling(0.1, GLOBAL_BATCH)
    return _pretraining("nfnet_f4_plus_300m", "nfnet_f4_plus", epochs=20, learning_rate=rate, eval_px=224)


def nfnet_f4_300m() -> Run:
    """NFNet-F4 (316M parameters) on 300M images, 40 epochs at 224 px (Brock et al. 2021, A.5)

    Command:  normfree pretrain nfnet_f4_300m --data.url s3://BUCKET/upstream --out s3://BUCKET/runs/nfnet_f4_300m
    Hardware: 3,700 core days of TPUv3 (table 5); not run here
    Result:   top-1 89.2 % on ImageNet after fine-tuning (table 5): what F4+ reaches at half of the cost
    Choices:  as nfnet_f4_plus_300m
    """
    rate = linear_scaling(0.1, GLOBAL_BATCH)
    return _pretraining("nfnet_f4_300m", "nfnet_f4", epochs=40, learning_rate=rate, eval_px=224)


def nfnet_f7_plus_4b() -> Run:
    """NFNet-F7+ (833M parameters) on 4B images, 8 epochs at 224 px (Smith et al. 2023)

    Command:  normfree pretrain nfnet_f7_plus_4b --data.url s3://BUCKET/upstream --out s3://BUCKET/runs/nfnet_f7_plus_4b
    Hardware: 110,000 core hours of TPUv4 (the paper's estimate); not run here
    Result:   top-1 90.3 % on ImageNet after fine-tuning, 90.4 % with repeated augmentation, on JFT-4B, which is not public
    Choices:  the learning rate is tuned for each budget by factors of 2: 1.6 for short ones, falling to 0.4 for the longest
              in the paper's figure, and faster for large models: 0.4 is taken (two trials with less data will tell). The
              rest is that of nfnet_f4_plus_300m, as the paper says of it; evaluation at 256 px
    """
    return _pretraining("nfnet_f7_plus_4b", "nfnet_f7_plus", epochs=8, learning_rate=0.4, eval_px=256)


RECIPES = {f.__name__: Recipe.of(f, JFT_300M) for f in (nfnet_f4_plus_300m, nfnet_f4_300m)}
RECIPES["nfnet_f7_plus_4b"] = Recipe.of(nfnet_f7_plus_4b, JFT_4B)
