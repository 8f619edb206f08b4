"""The backbones of a sweep: what trials need to know of each, read once at its start and compared when it is used."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.configuration import check_fields, to_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError
from pipeline.field_types import NonNegative, Positive
from pipeline.models.backbone import find_origin
from pipeline.models.families import kind_of
from transfer.probes import features
from transfer.probes.pyramid import pyramid_bytes
from transfer.protocol.method_settings import DetectSettings, FamilySettings, SegmentSettings
from transfer.protocol.methods import Method, sha256
from transfer.protocol.recipes.families import sentence
from transfer.protocol.tasks import INITS, Init, Task
from transfer.protocol.truth import OWN_METHOD

REGULARISATION = ("drop_rate", "stochastic_depth", "head_init")


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """What a network without weights is trained on before its trial, by the trial's recipe; the trial starts from that."""

    card: str = ""
    """A prepared dataset beside the trial's, all of its train split; empty = the trial's own images, and its head is kept."""
    epochs: Positive
    options: dict[str, Any] = field(default_factory=dict)
    """Of the network, where they are others than the trial's."""
    weight_decay: NonNegative | None = None
    """None: the recipe's."""

    def __post_init__(self) -> None:
        check_fields(self, "first")


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A backbone under test: what trials need to know of it."""

    checkpoint_url: str
    digest: str
    model: str
    options: dict[str, Any]
    augment: AugmentConfig
    """Of pretraining: resolution and normalisation carry over."""
    name: str = ""
    """For people."""
    classes: int = 0
    """Of its own head."""
    methods: tuple[str, ...] = ()
    """Names of the suite's methods that it is measured with; () = all."""
    first: FirstStage | None = None
    """Of one without weights."""
    downstream: tuple[str, ...] = ()
    """Of one without weights: cards that its trained network is measured on (`transfer.measurement.downstream`)."""

    def backbone_options(self) -> dict[str, Any]:
        """Options that shape the network; what regularised pretraining is the recipe's to say."""
        return {k: v for k, v in self.options.items() if k not in REGULARISATION}

    @property
    def is_fresh(self) -> bool:
        """It has no weights: trained from scratch only."""
        return not self.digest

    def inits(self, method: str) -> tuple[Init, ...]:
        """The starts that it is measured with by a method."""
        if self.methods and method not in self.methods:
            return ()
        return ("scratch",) if self.is_fresh else INITS

    @property
    def backbone_digest(self) -> str:
        """Of everything but the weights: equal where one from-scratch baseline serves."""
        what = [self.model, self.backbone_options(), to_dict(evaluation_form(self.augment))]
        if self.first is not None or self.downstream:
            what += [None if self.first is None else to_dict(self.first), list(self.downstream)]
        return sha256(what)

    def check_weights(self) -> None:
        """UserError if the checkpoint was replaced since the sweep began."""
        features.refuse_other_weights(self.checkpoint_url, find_origin(self.checkpoint_url).digest, self.digest)


def evaluation_form(augment: AugmentConfig) -> AugmentConfig:
    """What of a preprocessing reaches evaluation images and carries over to a task."""
    kept = ("image_px", "eval_px", "eval_resize", "eval_crop", "interpolation", "mean", "std")
    return AugmentConfig(**{k: getattr(augment, k) for k in kept})


def open_source(url: str, name: str = "") -> Backbone:
    """The backbone at `url` (`pipeline.models.backbone`). UserError if there is none, or none that verifies."""
    origin = find_origin(url)
    return Backbone(
        checkpoint_url=origin.url,
        digest=origin.digest,
        model=origin.model,
        options=origin.options,
        augment=origin.augment,
        name=name or origin.label,
        classes=len(origin.classes),
    )


def distinct(sources: Sequence[Backbone]) -> tuple[Backbone, ...]:
    """Sources with names of their own. UserError where one is given twice."""
    seen: dict[str, Backbone] = {}
    for source in sources:
        if source.digest in seen:
            raise UserError(
                f"{source.checkpoint_url} and {seen[source.digest].checkpoint_url} are the same weights; give one"
            )
        seen[source.digest] = source
    names = [s.name for s in sources]
    return tuple(
        dataclasses.replace(s, name=f"{s.name} ({s.digest[:6]})") if names.count(s.name) > 1 else s for s in sources
    )


def refuse_without_maps(sources: Sequence[Backbone], methods: Sequence[Method], tasks: Sequence[Task] = ()) -> None:
    """UserError where a backbone has no rows and columns of features, or these at one resolution only, for a method that needs
    them, or where those of a task's training images are more than memory is used for."""
    for method in methods:
        settings = method.settings
        for kind, of_one in ((SegmentSettings, features.map_bytes), (DetectSettings, pyramid_bytes)):
            for source in sources if isinstance(settings, kind) else ():
                if source.inits(method.name):
                    px = settings.image_px or source.augment.evaluation_px
                    num_bytes = of_one(source.model, source.backbone_options(), px)
                    for task in tasks:
                        if OWN_METHOD.get(task.truth.kind, (None, None))[1] is kind:
                            _refuse_large(source, task, px, num_bytes * len(task.train_labels))


def _refuse_large(source: Backbone, task: Task, px: int, num_bytes: int) -> None:
    if num_bytes > features.MAX_MAP_BYTES:
        whose = f"{len(task.train_labels):,} training images of {task.name} at {px} px by {source.name or source.model}"
        most = f"{features.MAX_MAP_BYTES >> 30} at most are held in memory"
        raise UserError(f"the maps of {whose} take {num_bytes / 2**30:,.0f} GiB, and {most}; set a smaller image_px")


def recipes_told(sources: Sequence[Backbone], methods: Sequence[Method]) -> list[str]:
    """A line for each backbone and method whose recipe is that of the backbone's family."""
    lines = []
    for method in methods:
        settings = method.settings
        if not isinstance(settings, FamilySettings):
            continue
        for source in sources:
            if source.inits(method.name):
                kind = kind_of(source.model, source.backbone_options())
                lines.append(f"{source.name or source.model}, {method.name}: {sentence(kind, settings)}")
    return lines
