"""An experiment as a sweep: its methods are backbones without weights, its recipes the sweep's methods, its data the one task.

So a laboratory's trials are a sweep's trials: the same ledger, budgets, kills and growth, hyper-parameters that are chosen on the
held-out part, final trials on the test split, seed by seed.
"""

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Any

from nfnet.normalizers.registry import get_method, make_method
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.make_order import check_classes
from pipeline.errors import UserError
from pipeline.models import backbone, trunks
from pipeline.models.backbone import typed_options
from pipeline.storage import objects
from transfer.lab.experiment import Experiment, parse_method
from transfer.measurement.downstream import open_downstream
from transfer.protocol.method_settings import FinetuneSettings
from transfer.protocol.methods import Method
from transfer.protocol.tasks import Suite, TaskEntry
from transfer.sweep.cells import Sweep
from transfer.sweep.sources import Backbone

SETTING, LENGTH = "stat_group", "total_steps"
"""Settings that an experiment fills in where a method has them: the group, and the length of the training in updates."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: everything but the seed (and the rate, where it is chosen)."""

    word: str
    """The method as the experiment writes it."""
    batch: int
    stat_group: int | None
    """None: the method has no groups."""
    rate: float | None
    """None: chosen among the experiment's rates."""
    settings: dict[str, Any]
    """Of the recipe: how gradients are clipped."""

    @property
    def recipe(self) -> str:
        """Name of the sweep's method."""
        rate = [] if self.rate is None else [f"rate {self.rate:g}"]
        words = "_".join([f"batch {self.batch}", *_words(self.settings), *rate])
        return re.sub(r"\W+", "_", words.replace(".", "p").replace("-", "m"))

    @property
    def network(self) -> str:
        """Name of the sweep's backbone: without the settings of the recipe, which make no other network."""
        name, own, _ = parse_method(self.word)
        group = "" if self.stat_group is None else f" g={self.stat_group or self.batch}"
        return ":".join([name, *(f"{k}={v}" for k, v in own.items())]) + group

    @property
    def shown(self) -> str:
        """Network and recipe, for people: a bare name has the method's own clipping."""
        own = f"clipping {get_method(parse_method(self.word)[0]).clipping:g}"
        return " ".join([self.network, *(words for words in _words(self.settings) if words != own)])

    def matches(self, wanted: dict[str, Any]) -> bool:
        own = {"method": self.word, "batch": self.batch, "stat_group": self.stat_group, "rate": self.rate}
        return all(own[key] == value for key, value in wanted.items())


def lines_of(experiment: Experiment) -> list[Line]:
    """All lines. UserError, before anything is trained, for one that cannot be."""
    found: list[Line] = []
    rates = experiment.rates if experiment.each_rate else (None,)
    _check_teacher(experiment)
    for word in experiment.methods:
        name, own, recipe = parse_method(word)
        clipping = (
            recipe if recipe.get("clip") in ("norm", "none") else {"clipping": get_method(name).clipping, **recipe}
        )
        has_groups = SETTING in _fields(name) and SETTING not in own
        for batch in experiment.batches:
            groups = [g for g in experiment.stat_groups if g <= batch] if has_groups else [None]
            for group in groups:
                _check(experiment, word, name, _settings(name, own, group), batch)
                for rate in rates:
                    found.append(Line(word=word, batch=batch, stat_group=group, rate=rate, settings=clipping))
    return found


def _words(settings: dict[str, Any]) -> list[str]:
    shown = {
        k: " ".join(v) if isinstance(v, tuple) else f"{v:g}" if type(v) is float else v for k, v in settings.items()
    }
    return [f"{key} {value}" for key, value in shown.items()]


def _fields(name: str) -> list[str]:
    return [f.name for f in dataclasses.fields(get_method(name))]


def _num_steps(experiment: Experiment, line: Line, data: str) -> int:
    """Updates of a final trial."""
    found = Manifest.open(data)
    num = experiment.shots * len(found.classes) or found.split("train").num_samples
    return max(1, round(experiment.epochs * num / min(line.batch, num)))


def _settings(name: str, own: dict[str, str], group: int | None) -> dict[str, Any]:
    given = {"method": name, **own, **({} if group is None else {SETTING: group})}
    return trunks.typed_options(given)


def _check(experiment: Experiment, word: str, name: str, settings: dict[str, Any], batch: int) -> None:
    import torch

    try:
        with torch.device("meta"):
            for more in ({}, experiment.first.options if experiment.first else {}):
                options = trunks.typed_options({**experiment.trunk_options, **settings, **more})
                trunks.make(trunks.PREFIX + experiment.trunk, 2, options)
        make_method(name, **{k: v for k, v in settings.items() if k != "method"}).check_batch(batch)
    except (UserError, ValueError) as error:
        raise UserError(f"{word} at batch {batch}: {error}") from None


def _check_teacher(experiment: Experiment) -> None:
    import torch

    if (teacher := experiment.teacher) is None:
        return
    for batch in experiment.batches:
        try:
            with torch.device("meta"):
                trunks.check_batch(backbone.make(teacher.model, 2, teacher.options), batch)
        except UserError as error:
            raise UserError(f"the teacher at batch {batch}: {error}") from None


def sweep_of_experiment(
    experiment: Experiment, *, data: str, out: str, lines: list[Line] | None = None
) -> tuple[Sweep, list[Line]]:
    """The sweep of an experiment on the prepared dataset at `data`, ROOT/<card>; or of some lines of it."""
    lines = lines_of(experiment) if lines is None else lines
    root, _, card = data.rstrip("/").rpartition("/")
    if any(line.settings.get("correlated") for line in lines):
        check_classes(data, len(Manifest.open(data).classes))
    if experiment.first and experiment.first.card:
        _find_first(objects.join(root, experiment.first.card), experiment)
    for name in experiment.downstream:
        open_downstream(name, root)
    sources: dict[str, Backbone] = {}
    for line in lines:
        name, own, _ = parse_method(line.word)
        settings = _settings(name, own, line.stat_group)
        if LENGTH in _fields(name) and LENGTH not in own:
            settings[LENGTH] = _num_steps(experiment, line, data)
        known = sources.get(line.network)
        methods = (*(known.methods if known else ()), line.recipe)
        sources[line.network] = _backbone(experiment, line, settings, methods)
    recipes = {line.recipe: _recipe(experiment, line) for line in lines}
    suite = Suite(
        name=experiment.name,
        title=experiment.title or experiment.name,
        tasks=(TaskEntry(card=card, holdout_per_class=experiment.holdout_per_class),),
        methods=tuple(recipes.values()),
        num_seeds=experiment.seeds,
    )
    out = out if "://" in out else os.path.abspath(os.path.expanduser(out))
    root = root if "://" in root else os.path.abspath(os.path.expanduser(root or "."))
    return Sweep(out=out, data_root=root, sources=tuple(sources.values()), suite=suite, scheduler="none"), lines


def _find_first(url: str, experiment: Experiment) -> None:
    """UserError where the data of the first stage are not prepared."""
    try:
        Manifest.open(url)
    except (UserError, OSError) as error:
        raise UserError(f"experiment {experiment.name} trains on {url} first, which cannot be had: {error}") from None


def _backbone(experiment: Experiment, line: Line, settings: dict[str, Any], methods: tuple[str, ...]) -> Backbone:
    model = trunks.PREFIX + experiment.trunk
    first = experiment.first
    if first is not None:
        first = dataclasses.replace(first, options=_own_options(experiment, settings, first.options))
    return Backbone(
        checkpoint_url="",
        digest="",
        model=model,
        options=typed_options(model, {**experiment.trunk_options, **settings}),
        augment=AugmentConfig(image_px=experiment.image_px, crop="area", area_min=0.5),
        name=line.network,
        methods=tuple(dict.fromkeys(methods)),
        first=first,
        downstream=experiment.downstream,
    )


def _own_options(experiment: Experiment, settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of a first stage, with their types."""
    typed = typed_options(trunks.PREFIX + experiment.trunk, {"method": settings["method"], **options})
    return {key: typed[key] for key in options}


def _recipe(experiment: Experiment, line: Line) -> Method:
    words = {key: value for key, value in line.settings.items() if key != "taught"}
    settings = FinetuneSettings(
        split="few_shot" if experiment.shots else "full",
        shots=(experiment.shots,) if experiment.shots else (),
        learning_rates=experiment.rates if line.rate is None else (line.rate,),
        epochs=(experiment.epochs,),
        batch=line.batch,
        **words,
        teacher=experiment.teacher if line.settings.get("taught") else None,
        weight_decay=experiment.weight_decay,
        warmup_share=experiment.warmup_share,
    )
    return Method(name=line.recipe, kind="finetune", settings=settings)
