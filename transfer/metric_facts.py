"""What a metric's number means to people: its title, unit, range and direction, and which numbers may be averaged with which."""

from dataclasses import dataclass, replace

from transfer.protocol.imagenet_labels import CORRUPTED, ON, REAL, V2

CONFIDENCE, LEVEL = 0.95, 0.05
"""Of every interval; of every test."""


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """Of one metric, by its name in `transfer.metrics.METRICS` and of `transfer.protocol.imagenet_labels`."""

    title: str
    short: str
    """For a column."""
    family: str
    """Numbers of one family are of one kind: their differences may be averaged and drawn on one axis."""
    unit: str = "%"
    """Of a value; of a difference it is "points" where this is %."""
    scale: float = 100.0
    """From the stored value to the one that people read."""
    decimals: int = 1
    within: tuple[float, float] | None = (0.0, 1.0)
    """Range of the stored value."""
    larger_is_better: bool = True
    counts_images: bool = False
    """It is a share of test images, so that Wilson's interval is its."""

    def text(self, value: float, *, sign: bool = False) -> str:
        """A stored value, or a difference of two, as people read it: 72.4 or +72.4."""
        return f"{self.scale * value:{'+' if sign else ''}.{self.decimals}f}"

    def full_text(self, value: float) -> str:
        """With name and unit: "top-1 72.4 %"."""
        return f"{self.short} {self.text(value)} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """With its unit: "top-1, %"."""
        return f"{self.short}, {self.unit}" if self.unit else self.short

    @property
    def difference_unit(self) -> str:
        return "points" if self.unit == "%" else self.short


ACCURACY, AREA, PRECISION = "accuracy", "area under the ROC curve", "average precision"
METRIC_FACTS: dict[str, MetricFacts] = {
    "top1": MetricFacts(title="top-1 accuracy", short="top-1", family=ACCURACY, counts_images=True),
    "top5": MetricFacts(title="top-5 accuracy", short="top-5", family="top-5 accuracy", counts_images=True),
    "mean_per_class": MetricFacts(title="mean accuracy of the classes", short="per class", family=ACCURACY),
    "balanced_accuracy": MetricFacts(title="balanced accuracy", short="balanced", family=ACCURACY),
    "auroc": MetricFacts(title="area under the ROC curve", short="AUROC", family=AREA, unit="", scale=1.0, decimals=3),
    "map11": MetricFacts(title="11-point mean average precision", short="mAP-11", family=PRECISION),
    "map_area": MetricFacts(title="mean average precision (area)", short="mAP-area", family=PRECISION),
    "map": MetricFacts(title="mean average precision", short="mAP", family=PRECISION),
    "miou": MetricFacts(title="mean intersection over union", short="mIoU", family="mIoU"),
    "pixel_accuracy": MetricFacts(title="pixel accuracy", short="pixels right", family="pixel accuracy"),
    "box_map": MetricFacts(
        title="mean average precision of boxes, IoU 0.5 to 0.95", short="mAP 50:95", family="box precision"
    ),
    "box_map50": MetricFacts(
        title="mean average precision of boxes, IoU 0.5", short="mAP 50", family="box precision at 0.5"
    ),
    "real": MetricFacts(title="ReaL accuracy", short="ReaL", family=ACCURACY, counts_images=True),
    "ece15": MetricFacts(
        title="expected calibration error, 15 bins", short="ECE, 15 bins", family="calibration", larger_is_better=False
    ),
    "accuracy_at_80": MetricFacts(
        title="top-1 accuracy of the surest 80 %", short="top-1 at 80 % coverage", family="selective"
    ),
    "kappa2": MetricFacts(
        title="Cohen's kappa, quadratic weights",
        short="kappa",
        family="kappa",
        unit="",
        scale=1.0,
        decimals=3,
        within=(-1.0, 1.0),
    ),
    "mae": MetricFacts(
        title="mean absolute error",
        short="MAE",
        family="error in classes",
        unit="classes",
        scale=1.0,
        decimals=3,
        within=None,
        larger_is_better=False,
    ),
    REAL: MetricFacts(title="ReaL accuracy", short="ReaL", family=ACCURACY, counts_images=True),
    V2: MetricFacts(title="accuracy on ImageNet-V2", short="V2", family=ACCURACY, counts_images=True),
    CORRUPTED: MetricFacts(title="mean top-1 over corruptions", short="top-1, corrupted", family=ACCURACY),
}


def facts_of(metric: str) -> MetricFacts:
    """Of a metric that a ledger names; one that this version does not know is a share by its own name."""
    plain, of_k, k = metric.rpartition("_k")
    if of_k and k.isdigit() and plain in METRIC_FACTS:  # of a number of neighbours
        facts = METRIC_FACTS[plain]
        return replace(facts, title=f"{facts.title}, k = {k}", short=f"{facts.short}, k = {k}")
    if metric.startswith(ON):
        other = metric.removeprefix(ON)
        return replace(METRIC_FACTS["top1"], title=f"top-1 accuracy on {other}", short=f"top-1 on {other}")
    return METRIC_FACTS.get(metric) or MetricFacts(title=metric.replace("_", " "), short=metric, family=metric)
