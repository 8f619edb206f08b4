"""The backbones of a sweep: what trials need to know of each, read once at its start and compared when it is used."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.configuration import to_dict
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError
from pipeline.models.backbone import find_origin
from transfer.protocol.methods import sha256
from transfer.protocol.tasks import INITS, Init

REGULARISATION = ("drop_rate", "stochastic_depth", "head_init")


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
        return sha256([self.model, self.backbone_options(), to_dict(evaluation_form(self.augment))])

    def check_weights(self) -> None:
        """UserError if the checkpoint was replaced since the sweep began."""
        now = find_origin(self.checkpoint_url).digest
        if now != self.digest:
            raise UserError(
                f"{self.checkpoint_url} holds other weights now (digest {now[:12]}, then {self.digest[:12]}); restore the "
                "checkpoint, or run another sweep"
            )


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
