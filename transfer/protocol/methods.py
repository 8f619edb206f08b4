"""Protocols: what a method does with a task, specified completely before anything is run.

    split rule      few_shot: k images a class, a part of train held out | vtab1k: 800/200 to select, 1000 to fit
                    full: all of train; a share is held out to select, and fitted again with the rest
    method          a probe of frozen features, or a fine-tuning recipe; each with its budget and its search space
    preprocessing   the backbone's own, or a configured resolution
    metric          the card's, or a configured one

A protocol is everything that decides a number besides the backbone (its weights and preprocessing), the data's bytes, the
shots and the seed. Numbers with different protocol digests do not belong into one table.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pipeline.configuration import convert, from_dict, nearest, to_dict
from pipeline.errors import UserError
from pipeline.yaml_files.refusals import located, within
from transfer.protocol.method_settings import (
    GRID,
    DetectSettings,
    FamilySettings,
    FinetuneSettings,
    HyperruleSettings,
    KnnSettings,
    LinearSettings,
    LogisticSettings,
    RidgeSelectedSettings,
    RidgeSettings,
    SegmentSettings,
    Settings,
)
from transfer.protocol.search_space import Search

LATER = frozenset(
    [
        "search",
        "clip",
        "clip_norm",
        "unclipped",
        "clip_head",
        "optimiser",
        "layer_decay",
        "mixup_alpha",
        "cutmix_alpha",
        "policy_magnitude",
        "rate_factors",
        "batch_norm",
        "correlated",
        "teacher",
    ]
)
"""Settings that earlier protocols did not have, and that change no digest with their usual values."""
BEFORE: dict[str, Any] = {"convert_icc": True, "nesterov": True}
"""Settings that earlier protocols did not have, and what these did; that changes no digest either."""

# These texts enter protocol digests, so the rules keep the names that they had in version 1, wherever their code lies.
SPLIT_RULES = {
    "few_shot": "per class, first images of a fixed permutation held out, supports from the rest; search on the support of "
    "seed 0 (pipeline.data.subset 1)",
    "vtab1k": "the published first 800 of train and first 200 of val; both to fit again (transfer.vtab 1)",
    "full": "the official val split to select where test is another one, else of each class a share of a fixed permutation of "
    "train; both to fit again (pipeline.data.subset 1)",
}


# Brock et al. 2021, A.5, on ImageNet: 15,000 steps of 2,048. AGC's lambda is not stated there.
_A5_PLAIN: dict[str, Any] = {
    "learning_rates": (0.1,),
    "batch": 2048,
    "warmup_share": 1 / 3,
    "ema_decay": 0.9999,
    "area_min": 0.08,
    "clipping": 0.01,
    "convert_icc": False,
}
_A5 = _A5_PLAIN | {"weight_decay": 1e-5, "drop_rate": 0.25, "stochastic_depth": 0.1, "sam_rho": 0.05}
METHOD_KINDS: dict[str, tuple[type[Settings], str, dict[str, Any]]] = {
    "ridge": (RidgeSettings, "ridge on frozen features", {}),
    "ridge_selected": (RidgeSelectedSettings, "ridge, penalty by mean rank over tasks", {}),
    "knn": (KnnSettings, "nearest neighbours", {}),
    "linear": (LinearSettings, "linear probe", {}),
    "logistic": (LogisticSettings, "logistic regression", {}),
    "segment": (SegmentSettings, "linear segmentation of frozen maps", {}),
    "detect": (DetectSettings, "FCOS on frozen maps", {}),
    "finetune": (FinetuneSettings, "fine-tuning", {}),
    "hyperrule": (HyperruleSettings, "fine-tuning by BiT-HyperRule", {}),
    "by_family": (FamilySettings, "fine-tuning as each backbone's own literature", {}),
    "nfnet": (FinetuneSettings, "fine-tuning as NFNets (SAM, EMA, stochastic depth)", _A5 | {"num_steps": (15_000,)}),
    "nfnet_plain": (
        FinetuneSettings,
        "fine-tuning as NFNets, no regularisation",
        _A5_PLAIN | {"num_steps": (15_000,)},
    ),
    # Smith et al. 2023 state epochs, SAM, stochastic depth, dropout, sizes and repeats; the other numbers are A.5's.
    "convnets_at_scale": (
        FinetuneSettings,
        "fine-tuning as ConvNets at scale (50 epochs, repeated augmentation)",
        _A5 | {"epochs": (50.0,), "repeats": 4, "train_px": 384, "image_px": 480},
    ),
}
PROBES = ("ridge", "ridge_selected", "knn", "linear", "logistic", "segment", "detect")
HEADS = {
    "ridge": "ridge on pooled pre-logits, whitened by the support",
    "ridge_selected": "ridge on pooled pre-logits, whitened by the support",
    "knn": "cosine neighbours of pooled pre-logits; k up to the images of a class, and that number itself",
    "linear": "linear on pooled pre-logits, N(0, 0.01^2)",
    "logistic": "linear on pooled pre-logits, from zero",
    "segment": "linear on each position of the last maps, standardised by the fitted images; N(0, 0.01^2)",
    "detect": "torchvision's FCOS on a feature pyramid with P6 and P7 of the three coarsest maps from stride 4 up, standardised "
    "by the fitted images; at most 100 detections an image",
    "hyperrule": "linear, zero init; a support below the batch is repeated to fill it; size of the images from the images",
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method of a suite. Its name is unique in the suite; its kind says what is done."""

    name: str
    kind: str
    settings: Settings

    @property
    def is_probe(self) -> bool:
        return self.kind in PROBES

    @property
    def title(self) -> str:
        if self.settings.title:
            return self.settings.title
        usual = METHOD_KINDS[self.kind][1]
        where = {"few_shot": "", "vtab1k": ", VTAB-1k", "full": ", all images"}[self.settings.split]
        return usual + where

    def configured(self) -> dict[str, Any]:
        """Fields with something in them: what a suite's YAML may say."""
        said = {k: v for k in BEFORE if (v := getattr(self.settings, k, None)) is not None}
        found = plain_settings(self.settings) | said
        return {k: v for k, v in found.items() if v not in ([], "") and (k, v) != ("num_steps", 0)}

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, **plain_settings(self.settings)}


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Settings in plain containers. Fields that came later are not there with their usual values: they must change no digest."""
    found: dict[str, Any] = to_dict(settings)
    for field in dataclasses.fields(settings):
        if field.name in LATER and getattr(settings, field.name) == field.default:
            del found[field.name]
        if field.name in BEFORE and getattr(settings, field.name) == BEFORE[field.name]:
            del found[field.name]
    if "search" in found:
        found["search"] = settings.search.plain()  # type: ignore[attr-defined]
    return found


def draws_nothing(kind: str, init: str, shots: int) -> bool:
    """Whether a seed changes nothing of a final trial: fixed weights, all images of the task, a head that begins at no draw.

    Args:
        kind: of `METHOD_KINDS`.
        shots: images of each class; 0 or below = a split rule that takes all images of its split.
    """
    return init == "pretrained" and shots <= 0 and kind in ("ridge", "ridge_selected", "knn", "logistic")


def sha256(content: Any) -> str:
    """Hex digest of the canonical JSON of plain containers."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def as_before(suite: dict[str, Any]) -> dict[str, Any]:
    """A suite as a sweep's folder keeps it; settings that it was written without have the values that they had then."""
    methods = {}
    for name, settings in suite.get("methods", {}).items():
        kind = METHOD_KINDS.get(str(settings.get("kind", name)))
        known = {} if kind is None else {k: v for k, v in BEFORE.items() if hasattr(kind[0], k)}
        methods[name] = {**known, **settings}
    return {**suite, "methods": methods}


def parse_methods(content: Any, where: str) -> tuple[Method, ...]:
    """The `methods` of a suite: name -> settings, and `kind` where the name is not one. UserError for what is wrong."""
    with located(where):
        if not content:
            raise UserError.at(
                "methods", f"methods is {content!r}; give a mapping, with names such as {', '.join(METHOD_KINDS)}"
            )
        methods = []
        for name, settings in convert(dict[str, dict[str, Any]], content, "methods").items():
            kind = str(settings.get("kind", name))
            if kind not in METHOD_KINDS:
                sentence = f"no method is called {kind!r}; {nearest(kind, METHOD_KINDS)}"
                raise UserError.at(f"methods.{name}.kind", sentence)
            if not name.replace("_", "").isalnum():
                raise UserError.at(f"methods.{name}", f"the method {name!r} needs a name of letters, digits and _")
            with within(f"methods.{name}"):
                methods.append(Method(name=name, kind=kind, settings=_settings(kind, settings)))
    order = list(METHOD_KINDS)
    return tuple(sorted(methods, key=lambda m: (order.index(m.kind), m.name)))


def _settings(kind: str, content: dict[str, Any]) -> Settings:
    """What is given here, over what the kind presets."""
    cls, _, preset = METHOD_KINDS[kind]
    given = {key: value for key, value in content.items() if key != "kind"}
    values = {**preset, **given}
    if "num_steps" in given or "epochs" in given:  # one takes the place of the other
        values = {k: v for k, v in values.items() if k in given or k not in ("num_steps", "epochs")}
    if given.get("search") is not None:  # and a search that of the recipe's own point
        search = from_dict(Search, given["search"], "search")
        values = {k: v for k, v in values.items() if k in given or k not in (*GRID, *search.searched)} | {
            "search": search
        }
    return from_dict(cls, values)
