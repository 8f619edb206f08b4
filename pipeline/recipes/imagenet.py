"""NFNet-F0 to F6 on ImageNet from scratch: the recipe of Brock et al. 2021, appendix A, with its augmentation (A.3)."""

from __future__ import annotations

from functools import partial

from nfnet.schedule import linear_scaling
from nfnet.variants import get_variant
from pipeline.backbone import ModelConfig
from pipeline.config import Run
from pipeline.data.augment import nfnet_augment
from pipeline.data.loader import DataConfig
from pipeline.deepspeed_setup import EngineConfig
from pipeline.duration import Duration
from pipeline.update import OptimConfig

GLOBAL_BATCH = 4096
MAGNITUDES = (5, 10, 10, 15, 15, 15, 15)
"""RandAugment's, by depth: F0 to F6."""


def _from_scratch(depth: int) -> Run:
    variant = get_variant(f"nfnet_f{depth}")
    return Run(
        name=f"nfnet_f{depth}_imagenet",
        model=ModelConfig(name=f"nfnet_f{depth}", options={"drop_rate": variant.drop_rate, "stochastic_depth": 0.25}),
        data=DataConfig(num_workers=8),
        augment=nfnet_augment(MAGNITUDES[depth], image_px=variant.train_px, eval_px=variant.test_px),
        optim=OptimConfig(
            learning_rate=linear_scaling(0.1, GLOBAL_BATCH),
            warmup=Duration(5, "epochs"),
            weight_decay=2e-5,
            clipping=0.01,
            ema_decay=0.99999,
            label_smoothing=0.1,
        ),
        engine=EngineConfig(precision="bf16", zero_stage=1),
        global_batch=GLOBAL_BATCH,
        micro_batch=32,
        duration=Duration(360, "epochs"),
        eval_every=Duration(5, "epochs"),
        save_every=Duration(1, "epochs"),
    )


RECIPES = {f"nfnet_f{depth}_imagenet": partial(_from_scratch, depth) for depth in range(7)}
