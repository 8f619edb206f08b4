"""What each kind of method takes: its settings, their ranges and defaults."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pipeline.configuration import check_fields
from pipeline.data.sources import cards
from pipeline.engine.optim_config import Clip
from pipeline.errors import UserError
from pipeline.field_types import Count, CountOrZero, Items, NonNegative, Positive, Range, Share, ShareBelowOne, Text
from pipeline.models.backbone import typed_options
from pipeline.models.batch_norm import Statistics
from transfer.protocol.search_space import Search

Rule = Literal["few_shot", "vtab1k", "full"]
Metric = Literal["", "top5", cards.Metric]
Counts = Annotated[tuple[Count, ...], Items(distinct=True)]
Numbers = Annotated[tuple[Positive, ...], Items(distinct=True)]
Texts = Annotated[tuple[Text, ...], Items(distinct=True)]
Scheduler = Literal["halving", "hyperband", "asha", "none"]
ALL_IMAGES, VTAB_IMAGES = 0, -1000
"""In the place of shots, for the split rules full and vtab1k."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every method states."""

    shots: Counts = ()
    """Images of each class; for the split rule few_shot only."""
    split: Rule = "few_shot"
    """few_shot: so many images a class; vtab1k: the published 800 and 200; full: all images."""
    holdout_share: ShareBelowOne = 0.1
    """For the split rule full."""
    image_px: CountOrZero = 0
    """Side of the evaluation input, and of the training input unless the recipe states its own; 0 = the backbone's own."""
    convert_icc: bool = False
    """Bring colours to sRGB by embedded ICC profiles, as protocols before 2026-11-29 did; the public code of these methods
    ignores profiles."""
    metric: Metric = ""
    """Empty = the card's."""
    title: str = ""
    """For people; empty = the method's usual name."""

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.split == "few_shot") != bool(self.shots):
            raise UserError("shots are for the split rule few_shot, which needs them; give both, or neither")

    @property
    def columns(self) -> tuple[int, ...]:
        """What stands in the place of shots."""
        return {"few_shot": self.shots, "vtab1k": (VTAB_IMAGES,), "full": (ALL_IMAGES,)}[self.split]


@dataclass(frozen=True, kw_only=True)
class RidgeSettings(Settings):
    """Few-shot ridge on frozen features (`transfer.probes.ridge`)."""

    l2: NonNegative = 1024.0
    """Fixed: the published procedure does not tune it (facts 4.2)."""


@dataclass(frozen=True, kw_only=True)
class RidgeSelectedSettings(Settings):
    """The older variant: per number of shots the one penalty with the best mean rank over all tasks (facts 4.2)."""

    l2s: Numbers = tuple(2.0**i for i in range(-10, 20))
    """Penalties to choose from."""


@dataclass(frozen=True, kw_only=True)
class KnnSettings(Settings):
    """Nearest neighbours as DINOv2 votes (`transfer.probes.knn`); k is selected, and finals are measured with every k."""

    ks: Counts = (10, 20, 100, 200)
    """Numbers of neighbours to choose from; with shots those up to the number of images a class, and that number."""
    temperature: Positive = 0.07
    """Of the votes' softmax."""


@dataclass(frozen=True, kw_only=True)
class LinearSettings(Settings):
    """DINOv2's linear probe on cached features (`transfer.probes.linear`); the rate is selected."""

    learning_rates: Numbers = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    """At batch 256; times batch / 256 they are used."""
    num_steps: Count = 12_500
    """Updates of each head."""
    batch: Count = 128
    """Features of an update."""


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(Settings):
    """A linear head on frozen maps (`transfer.probes.segment`); the rate is selected."""

    learning_rates: Numbers = (1e-4, 1e-3, 1e-2)
    """AdamW's, falling linearly to 0."""
    weight_decay: NonNegative = 1e-4
    num_steps: Count = 2000
    """Updates of each head."""
    batch: Count = 16
    """Images of an update."""
    train_mask_px: Count = 128
    """Side that masks are brought to for the loss (the nearest pixel); they are measured at their own size."""


@dataclass(frozen=True, kw_only=True)
class DetectSettings(Settings):
    """torchvision's FCOS on frozen maps at several resolutions (`transfer.probes.detect`); the rate is selected."""

    learning_rates: Numbers = (1e-4, 1e-3)
    """AdamW's, falling linearly to 0."""
    weight_decay: NonNegative = 1e-4
    num_steps: Count = 2000
    """Updates of pyramid and head."""
    batch: Count = 16
    """Images of an update."""
    width: Literal[32, 64, 128, 256, 512] = 256
    """Channels of the pyramid and of the head's convolutions, whose group norm has 32 groups."""
    min_score: ShareBelowOne = 0.05
    """Detections below it are dropped."""
    nms_iou: Share = 0.6
    """Of two detections of a class that overlap more, the surer one is kept."""


@dataclass(frozen=True, kw_only=True)
class LogisticSettings(Settings):
    """L-BFGS logistic regression on features as they are (`transfer.probes.logistic`); C is selected."""

    unit_features: bool = False
    """Divide each image's features by their length first, which DINOv2 does for neighbours alone."""
    cs: Numbers = tuple(10.0 ** (-6 + 0.25 * i) for i in range(45))
    """Inverse penalties to choose from."""


GRID = ("learning_rates", "num_steps", "epochs")


@dataclass(frozen=True, kw_only=True)
class TeacherStage:
    """A network that each trial trains first, on its own images in its own batches, and that then says what it is trained to.

    Its rate, decay and clipping are not the trial's, so that lines and candidates that differ in these have the same teacher.
    """

    model: Text
    """As `model.name`, with fresh weights from the trial's seed."""
    options: dict[str, Any] = field(default_factory=dict)
    """As `model.options`."""
    epochs: Positive
    """Passes over the trial's training images."""
    learning_rate: Positive = 0.1
    weight_decay: NonNegative = 5e-4
    clipping: NonNegative = 0.0
    """AGC's lambda; 0 = no clipping."""

    def __post_init__(self) -> None:
        check_fields(self, "teacher")
        object.__setattr__(self, "options", typed_options(self.model, self.options))


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(Settings):
    """Fine-tuning of all layers with a new head (`transfer.sweep.finetune`).

    The space is a grid, learning_rates x schedule lengths, or else what `search` states.
    """

    convert_icc: bool = True
    """As above; true unless a recipe carries its paper's name."""
    learning_rates: Numbers = ()
    """Peaks to choose from."""
    num_steps: Counts = ()
    """Lengths of the schedule to choose from, in updates."""
    epochs: Numbers = ()
    """In place of num_steps: passes over the training images, repetitions included."""
    batch: Count = 64
    """Images of an update, at most: a smaller support is one batch."""
    area_min: Share = 0.5
    """Smallest share of a training image that the random crop keeps; 0 = the whole image, squeezed and not mirrored."""
    clipping: NonNegative = 0.02
    """AGC's lambda; 0 = no clipping."""
    clip: Clip = "agc"
    """As `optim.clip`, and the next three as `optim` has them."""
    clip_norm: Positive = 1.0
    unclipped: Texts = ()
    clip_head: bool = False
    correlated: bool = False
    """Each batch is sorted by class, so that groups of samples hold few classes (`data.order`)."""
    weight_decay: NonNegative = 0.0
    warmup_share: Share = 0.1
    """Of the schedule."""
    drop_rate: ShareBelowOne = 0.0
    """Dropout before the head."""
    stochastic_depth: ShareBelowOne = 0.0
    """Of the last block."""
    label_smoothing: ShareBelowOne = 0.0
    sam_rho: NonNegative = 0.0
    """SAM's radius; 0 = no SAM."""
    ema_decay: ShareBelowOne = 0.0
    """0 = no averaged weights."""
    repeats: Count = 1
    """Repeated augmentation; passes over the images are cut by it, so that the cost stays."""
    train_px: CountOrZero = 0
    """Side of the training input, where it differs from image_px."""
    optimiser: Literal["sgd", "momentum", "adamw"] = "sgd"
    """As `optim.name`: sgd is Nesterov's."""
    layer_decay: Annotated[float, Range(0, 1, without="low")] = 1.0
    """As `optim.layer_decay`: rates fall by it from each layer to the one before it."""
    batch_norm: Statistics = "local"
    """As `model.batch_norm`, for networks that have it."""
    mixup_alpha: Share = 0.0
    """As `augment.mixup_alpha`, and the next as `augment` has it."""
    cutmix_alpha: Share = 0.0
    policy_magnitude: Annotated[float, Range(0, 30)] = 0.0
    """Of RandAugment as torchvision has it, with two operations an image; 0 = none."""
    teacher: TeacherStage | None = None
    """Trained first, in each trial; its softmax then takes the place of the labels (`pipeline.models.teacher`)."""
    search: Search | None = None
    """In place of the grid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search is not None:
            self._check_search(self.search)
        elif not self.learning_rates or bool(self.num_steps) == bool(self.epochs):
            raise UserError("fine-tuning needs learning_rates, and either num_steps or epochs; set them, or a search")

    def _check_search(self, search: Search) -> None:
        grid = [name for name in GRID if getattr(self, name)]
        if grid:
            raise UserError(f"a grid ({', '.join(grid)}) and a search are both configured; keep one of them")
        usual = {f.name: f.default for f in dataclasses.fields(self)}
        twice = [name for name in search.searched if name not in GRID and getattr(self, name, None) != usual.get(name)]
        if twice:
            raise UserError(
                f"{', '.join(twice)} is configured and searched as well; leave it to the search, or out of it"
            )


@dataclass(frozen=True, kw_only=True)
class HyperruleSettings(Settings):
    """BiT-HyperRule (`transfer.protocol.recipes.bit_hyperrule`): sizes and budget follow from the task, nothing is searched."""

    variant: Literal["paper", "code"] = "paper"
    """Where they differ: how many steps, and when the rate falls."""
    batch: Count = 512
    """Images of an update."""
    clipping: NonNegative = 0.02
    """The rule's networks have no need of AGC; normaliser-free ones do."""
    resize: bool = True
    """False: the backbone's own resolution in place of the rule's 128 or 384 px; for networks made for small images."""
    num_steps: CountOrZero = 0
    """0 = the rule's; else warm-up and falls shrink with it, for tasks smaller than any the rule was made for."""
    nesterov: bool = False
    """Nesterov's momentum, which protocols before 2026-11-29 had; BiT's is plain."""
    rate_factors: Numbers = (1.0,)
    """Rates to choose from, as multiples of the rule's 0.003; the rule itself has one."""
    batch_norm: Statistics = "local"
    """As `model.batch_norm`, for networks that have it."""


@dataclass(frozen=True, kw_only=True)
class FamilySettings(Settings):
    """Fine-tuning as the literature of each backbone's own family has it (`transfer.protocol.recipes.families`)."""

    batch: Count = 512
    """Images of an update; for AdamW's families at most as many as there are."""
    num_steps: CountOrZero = 0
    """0 = BiT-HyperRule's, for all families."""
    rate_factors: Numbers = (1.0,)
    """Rates to choose from, as multiples of each family's own."""
    batch_norm: Statistics = "local"
    """As `model.batch_norm`, for networks that have it: trained with statistics of each micro-batch, as BiT and timm do it, or
    frozen."""
