"""An experiment: which methods are trained on what, and what would count as a claim's success. YAML, or the command's options.

Everything that is not a method is the same for all: trunk, data, budget, recipe, seeds. A method is written as in
`normalizer_free:clipping=0.02:alpha=0.2`: its name, and settings of its own or of its recipe after colons; several parts of a
network as `normalizer_free:unclipped=stage 0+stage 1`.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from nfnet.normalizers.registry import get_method, list_methods
from nfnet.trunks.networks import list_trunks
from pipeline.configuration import check_fields, convert, from_dict, hints, nearest, to_dict
from pipeline.errors import UserError
from pipeline.field_types import Count, CountOrZero, Items, NonNegative, Positive, ShareBelowOne, Text
from pipeline.storage import objects
from pipeline.yaml_files.parse import parse_yaml, read_yaml
from pipeline.yaml_files.refusals import located, within
from transfer.protocol.method_settings import FinetuneSettings, TeacherStage
from transfer.sweep.sources import FirstStage

RECIPE = (
    "clip",
    "clipping",
    "clip_norm",
    "unclipped",
    "clip_head",
    "correlated",
    "mixup_alpha",
    "cutmix_alpha",
    "policy_magnitude",
    "taught",
)
"""Settings that are the recipe's and not the network's: fields of `FinetuneSettings`, and `taught`, by the `teacher`."""
Statistic = Literal[
    "accuracy",
    "images_per_s",
    "mode_gap",
    "train_accuracy",
    "finishes",
    "clipped_share",
    "squared_mean",
    "variance",
    "constant_share",
    "generalisation_gap",
    "dead_share",
    "unit_correlation",
    "effective_beta",
    "loss_range",
    "mutual_information",
    "speed_ratio",
    "memory_ratio",
    "largest_rate",
    "downstream",
]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a claim says: the statistic of one line of the table is above that of another."""

    high: dict[str, Any]
    """Which line: method (as in `methods`), batch, stat_group, rate; what is not named must be the same for all."""
    low: dict[str, Any]
    high_over: dict[str, Any] | None = None
    """The first number is the gain of `high` over this line; needs `low_over`."""
    low_over: dict[str, Any] | None = None
    statistic: Statistic = "accuracy"
    """finishes: the share of seeds whose training stays finite; mode_gap: evaluation mode minus training mode, in share;
    generalisation_gap: accuracy on training images, not augmented, minus that on test images; squared_mean and variance: of the
    channels after a block, mean over blocks; constant_share: squared_mean over the sum of both; largest_rate: by the brackets of
    its bisection; downstream: mean over the cards; the others: `transfer.measurement`, `unit_measures` and `batch_norm_ratios`,
    mean over depth."""
    least: float = 0.0
    """By how much at least, besides the noise; below 0: it may be lower, but not by more than that."""

    def __post_init__(self) -> None:
        check_fields(self, "compare")
        if (self.high_over is None) != (self.low_over is None):
            raise UserError("compare has one of high_over and low_over; give both, or neither")


@dataclass(frozen=True, kw_only=True)
class RateSearch:
    """Bounds and price of `transfer.lab.largest_rate`: of each line and seed 2 + `halvings` short trials at most."""

    low: Positive = 0.05
    high: Positive = 25.6
    halvings: CountOrZero = 4
    epochs: Positive = 2.0

    def __post_init__(self) -> None:
        check_fields(self, "largest_rate")
        if self.low >= self.high:
            raise UserError(f"largest_rate has low {self.low:g} and high {self.high:g}; set low below high")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    name: Text
    title: str = ""
    claim: str = ""
    source: str = ""
    """Of the claim: paper and table."""
    trunk: Text = "resnet_v2_tiny"
    trunk_options: dict[str, Any] = field(default_factory=dict)
    methods: Annotated[tuple[Text, ...], Items(distinct=True)]
    batches: Annotated[tuple[Count, ...], Items(distinct=True)] = (128,)
    """Of the optimiser."""
    stat_groups: Annotated[tuple[CountOrZero, ...], Items(distinct=True)] = (0,)
    """Samples that share statistics, for methods that have such groups; 0 = the whole batch."""
    rates: Annotated[tuple[Positive, ...], Items(distinct=True)] = (0.1,)
    """Peak rates to choose from by the held-out part; with `each_rate` every rate is a line of its own."""
    each_rate: bool = False
    epochs: Positive = 2.0
    """Few, so that all methods and seeds on CIFAR-100's size are a matter of hours on two cores."""
    shots: CountOrZero = 0
    """Training images of a class; 0 = all."""
    holdout_per_class: Count = 10
    weight_decay: NonNegative = 5e-4
    warmup_share: ShareBelowOne = 0.125
    image_px: Count = 32
    downstream: Annotated[tuple[Text, ...], Items(distinct=True)] = ()
    """Prepared datasets beside the experiment's, on which each trained network's frozen features are measured."""
    largest_rate: RateSearch | None = None
    """Find the largest stable rate of each line too."""
    first: FirstStage | None = None
    """What each trial trains before, and starts from: another form of the network (`options`), or other data (`card`)."""
    teacher: TeacherStage | None = None
    """Of the methods with `taught=true`: each of their trials trains it before, and is then trained to its softmax."""
    seeds: Count = 3
    compare: tuple[Comparison, ...] = ()
    """All of them must hold for the claim to pass."""
    tiny: dict[str, Any] = field(default_factory=dict)
    """Fields that are others at the size tiny, which runs on two cores."""
    settles: str = ""
    """What would settle the claim, where this size does not."""

    def at_size(self, size: str) -> "Experiment":
        """The experiment with the fields of that size. UserError for a field that there is not."""
        changes = self.tiny if size == "tiny" else {}
        return from_dict(Experiment, {**to_dict(self), **changes, "tiny": {}}, "tiny")

    def __post_init__(self) -> None:
        check_fields(self, f"experiment {self.name}")
        if self.trunk not in list_trunks():
            raise UserError(f"trunk is {self.trunk!r}; {nearest(self.trunk, list_trunks())}")
        for word in self.methods:
            with within(f"methods[{word}]"):
                _, _, recipe = parse_method(word)
                if recipe.get("taught") and self.teacher is None:
                    usual = "teacher: {model: trunk:resnet_v2_tiny, epochs: 10}"
                    raise UserError(f"{word} is taught, and the experiment has no teacher; give it one, as {usual}")


def parse_method(word: str) -> tuple[str, dict[str, str], dict[str, Any]]:
    """(name, settings of the network, settings of the recipe) of `name:key=value:...`. UserError for what there is not."""
    name, *parts = word.split(":")
    if name not in list_methods():
        raise UserError(f"no method {name!r}; {nearest(name, list_methods())}")
    known = [f.name for f in fields(get_method(name))]
    own: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    types = {**hints(FinetuneSettings), "taught": bool}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in (*known, *RECIPE):
            raise UserError(
                f"{word}: no setting {key!r}; {nearest(key, [*known, *RECIPE])}, written as {name}:KEY=VALUE"
            )
        if key not in RECIPE:
            own[key] = value
            continue
        recipe[key] = convert(types[key], value.split("+") if key == "unclipped" else value, f"{word}: {key}")
    return name, own, recipe


def experiments_dir() -> Path:
    return Path(__file__).with_name("experiments")


def list_experiments() -> list[str]:
    return sorted(p.stem for p in experiments_dir().glob("*.yaml"))


def load_experiment(name_or_path: str) -> Experiment:
    """The experiment of that name, or of the YAML file at that path. UserError for unknown names, keys and wrong values."""
    if name_or_path in list_experiments():
        path = str(experiments_dir() / f"{name_or_path}.yaml")
    elif name_or_path.endswith((".yaml", ".yml")) and objects.is_file(name_or_path):
        path = name_or_path
    else:
        known = list_experiments()
        raise UserError(
            f"no experiment {name_or_path!r}; give the path of a YAML file, or {nearest(name_or_path, known)}"
        )
    where, data = f"the experiment {path}", read_yaml(path)
    content = parse_yaml(data, where)
    with located(where, data):
        found = from_dict(Experiment, content)
        found.at_size("tiny")  # refused now, with the line
        return found
