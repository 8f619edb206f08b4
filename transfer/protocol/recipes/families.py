"""Fine-tuning as the literature of a backbone's own family has it: which optimiser, which rates, which regularisation.

One protocol holds the recipes of all families, so backbones of different families may stand in one table: each has what its
authors use, and all have the same number of updates, which BiT-HyperRule gives by the number of images (published schedules are
ImageNet's and say nothing of small tasks). Rates are those of the source times `rate_factors`, the same factors for all; heads
begin at zero.

    resnet     BiT-HyperRule, its code's variant (Kolesnikov et al. 2020; big_transfer bit_pytorch/train.py): plain momentum
    nfnet      the same with Nesterov's momentum and AGC at 0.01, as NFNets were trained (Brock et al. 2021, 4.1 and A.1)
    vit        He et al. 2022 (MAE), table 9, from memory: AdamW, 0.75 a layer, MixUp, CutMix, RandAugment (9, 0.5)
    convnext   Liu et al. 2022, facebookresearch/ConvNeXt TRAINING.md at 231af90, from ImageNet-22k at 224 px: AdamW, 0.8 a layer
    swin       Xie et al. 2022, microsoft/SimMIM configs/swin_base__100ep/simmim_finetune__..._224_...yaml at 0e71746: AdamW, 0.9

Ours, where the sources are ImageNet's or need what there is not here: RandAugment is torchvision's form (two operations, no
noise of its strength); no random erasing; each backbone keeps its own resolution, BiT's too, whose ratio of crop to image stays.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.models.families import Family, Kind
from transfer.protocol.method_settings import FamilySettings, FinetuneSettings, HyperruleSettings
from transfer.protocol.recipes.bit_hyperrule import hyperrule

MIX_AT_LEAST = 8
"""Images of a batch: smaller ones hold too few pairs to be mixed."""


@dataclass(frozen=True, kw_only=True)
class AdamWRecipe:
    """What an AdamW recipe states besides its schedule's length."""

    rate: float
    """At batch `rate_batch`; in proportion to the batch elsewhere."""
    rate_batch: int
    layer_decay: float
    weight_decay: float
    warmup_share: float
    stochastic_depth: float
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    policy_magnitude: float = 9.0
    area_min: float = 0.08

    def sentence(self) -> str:
        mixing = f"MixUp {self.mixup_alpha:g}, CutMix {self.cutmix_alpha:g}, " if self.mixup_alpha else ""
        return (
            f"AdamW, rate {self.rate:g} at batch {self.rate_batch}, {self.layer_decay:g} of it from layer to layer, weight "
            f"decay {self.weight_decay:g}, stochastic depth {self.stochastic_depth:g}, label smoothing "
            f"{self.label_smoothing:g}, {mixing}RandAugment {self.policy_magnitude:g}"
        )


_MIXED: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
ADAMW: dict[Family, AdamWRecipe] = {
    "vit": AdamWRecipe(
        rate=1e-3,
        rate_batch=256,
        layer_decay=0.75,
        weight_decay=0.05,
        warmup_share=0.05,
        stochastic_depth=0.1,
        **_MIXED,
    ),
    "convnext": AdamWRecipe(
        rate=5e-5, rate_batch=512, layer_decay=0.8, weight_decay=1e-8, warmup_share=0.0, stochastic_depth=0.2
    ),
    "swin": AdamWRecipe(
        rate=1.25e-3,
        rate_batch=512,
        layer_decay=0.9,
        weight_decay=0.05,
        warmup_share=0.2,
        stochastic_depth=0.1,
        **_MIXED,
    ),
}
SGD: dict[Family, dict[str, Any]] = {
    "resnet": {"nesterov": False, "clipping": 0.0},
    "nfnet": {"nesterov": True, "clipping": 0.01},
}
"""Over BiT-HyperRule, as its code has it, at the backbone's own resolution."""


def plain() -> dict[str, Any]:
    """All recipes: what a protocol's digest covers."""
    found: dict[str, Any] = {"length": "BiT-HyperRule, code"}
    found.update({name: dict(recipe) for name, recipe in SGD.items()})
    found.update({name: asdict(recipe) for name, recipe in ADAMW.items()})
    return found


def sentence(kind: Kind, settings: FamilySettings) -> str:
    """The recipe that a network has, for people."""
    family = kind.family
    if family in ADAMW:
        text = ADAMW[family].sentence()
    else:
        clip = SGD[family]["clipping"]
        momentum = "Nesterov's momentum" if SGD[family]["nesterov"] else "plain momentum"
        text = f"SGD with {momentum} by BiT-HyperRule, {f'AGC {clip:g}' if clip else 'no clipping'}"
    factors = (
        "" if settings.rate_factors == (1.0,) else f"; rates times {', '.join(f'{f:g}' for f in settings.rate_factors)}"
    )
    statistics = f"; statistics of batch normalisation {settings.batch_norm}" if kind.has_batch_norm else ""
    if settings.batch_norm != "local" and not kind.has_batch_norm:
        statistics = f"; it has no batch normalisation of torch's, so {settings.batch_norm} changes nothing"
    guess = f" ({kind.guess})" if kind.guess else ""
    return f"family {family}{guess}: {text}{statistics}{factors}"


def recipe(
    kind: Kind, settings: FamilySettings, *, num_images: int, image_area_px: int, random_crop: bool
) -> FinetuneSettings | HyperruleSettings:
    """The settings of a network on one task.

    Args:
        num_images: of the final trials.
        image_area_px: height x width of the raw images.
        random_crop: False where a crop changes the label: the whole image, unmixed.
    """
    family = kind.family
    common: dict[str, Any] = {name: getattr(settings, name) for name in _COMMON}
    common["batch_norm"] = settings.batch_norm if kind.has_batch_norm else "local"
    if family in SGD:
        return HyperruleSettings(
            **common,
            **SGD[family],
            variant="code",
            batch=settings.batch,
            num_steps=settings.num_steps,
            rate_factors=settings.rate_factors,
            resize=False,
        )
    own, batch = asdict(ADAMW[family]), min(settings.batch, num_images)
    rate, rate_batch = own.pop("rate"), own.pop("rate_batch")
    if not random_crop:
        own |= {"policy_magnitude": 0.0, "area_min": 0.0}
    if not random_crop or batch < MIX_AT_LEAST:
        own |= {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}
    return FinetuneSettings(
        **common,
        **own,
        learning_rates=tuple(factor * rate * batch / rate_batch for factor in settings.rate_factors),
        num_steps=(settings.num_steps or hyperrule(num_images, image_area_px, variant="code").steps,),
        batch=batch,
        optimiser="adamw",
        clipping=0.0,
    )


_COMMON = ("shots", "split", "holdout_share", "image_px", "metric", "title", "convert_icc")
