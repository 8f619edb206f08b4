"""NFNet-F0 to F6 on ImageNet from scratch: the recipe of Brock et al. 2021, appendix A, with its augmentation (A.3)."""

from functools import partial

from nfnet.optim.schedule import linear_scaling
from nfnet.variants import get_variant
from pipeline.data.augment.augment_config import nfnet_augment
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.models.backbone import ModelConfig
from pipeline.recipes.recipe import IMAGENET, PREPARE_IMAGENET, Recipe
from pipeline.training.run import Run

GLOBAL_BATCH, EPOCHS = 4096, 360
SAM_RHO = {5: 0.05, 6: 0.05}
"""SAM serves F5 and F6 alone (A.4)."""

# depth: ((top-1, top-5), ms of a step of 32 images on a TPUv3 core, the same on a V100 in fp16), table 3; with SAM where
# the recipe has it, which nobody timed on a V100.
TABLE_3: dict[int, tuple[tuple[float, float], float, float | None]] = {
    0: ((83.6, 96.8), 73.3, 56.7),
    1: ((84.7, 97.1), 158.5, 133.9),
    2: ((85.1, 97.3), 295.8, 226.3),
    3: ((85.7, 97.5), 532.2, 524.5),
    4: ((85.9, 97.6), 1033.3, 1190.6),
    5: ((86.3, 97.9), 1958.0, None),
    6: ((86.5, 97.9), 2774.1, None),
}

HEADER = """NFNet-F{depth} on ImageNet from scratch, {px} px (Brock et al. 2021, A.1 and A.3{sam_source})

Command:  {prepare}
          normfree pretrain {name} --data.url data/imagenet --out runs/{name} --num-processes 8
Hardware: {hours:,.0f} core hours of TPUv3{gpu}, from the paper's milliseconds a step (table 3); not run here
Result:   top-1 {top1} %, top-5 {top5} % at {eval_px} px, averaged weights ({seeds}, table 3)"""

SAM_CHOICE = """
Choices:  SAM's radius for ImageNet from scratch is printed nowhere: 0.05 is that of the paper's fine-tuning (A.5). Without
          it, --optim.sam_rho 0, the paper has {without} for F5"""


def _from_scratch(depth: int) -> Run:
    variant = get_variant(f"nfnet_f{depth}")
    return Run(
        name=f"nfnet_f{depth}_imagenet",
        model=ModelConfig(name=f"nfnet_f{depth}", options={"drop_rate": variant.drop_rate, "stochastic_depth": 0.25}),
        data=DataConfig(num_workers=8),
        augment=nfnet_augment(variant.augment_magnitude, image_px=variant.train_px, eval_px=variant.test_px),
        optim=OptimConfig(
            learning_rate=linear_scaling(0.1, GLOBAL_BATCH),
            warmup=Duration(5, "epochs"),
            weight_decay=2e-5,
            clipping=0.01,
            ema_decay=0.99999,
            label_smoothing=0.1,
            sam_rho=SAM_RHO.get(depth, 0.0),
        ),
        engine=EngineConfig(precision="bf16", zero_stage=1),
        global_batch=GLOBAL_BATCH,
        micro_batch=32,
        duration=Duration(EPOCHS, "epochs"),
        eval_every=Duration(5, "epochs"),
        save_every=Duration(1, "epochs"),
    )


def _hours(milliseconds: float) -> float:
    """Of one core that takes so long for a step of 32 images."""
    return EPOCHS * IMAGENET / 32 * milliseconds / 3.6e6


def _header(depth: int) -> str:
    run, (accuracy, tpu_ms, gpu_ms) = _from_scratch(depth), TABLE_3[depth]
    text = HEADER.format(
        depth=depth,
        px=run.augment.image_px,
        sam_source=", SAM: A.4" if depth in SAM_RHO else "",
        prepare=PREPARE_IMAGENET,
        name=run.name,
        hours=_hours(tpu_ms),
        gpu=f" or {_hours(gpu_ms):,.0f} hours of one V100" if gpu_ms else "",
        top1=accuracy[0],
        top5=accuracy[1],
        eval_px=run.augment.eval_px,
        seeds="one seed" if depth in SAM_RHO else "mean of 3 seeds",
    )
    return text + (SAM_CHOICE.format(without="86.0 %, 97.6 %") if depth in SAM_RHO else "")


RECIPES = {
    f"nfnet_f{depth}_imagenet": Recipe(make=partial(_from_scratch, depth), header=_header(depth)) for depth in TABLE_3
}
