"""What is measured of a trained network besides its score: what training mode and evaluation mode make of the same images, what
other running averages would give, and how signals travel through it.

    train_mode, eval_mode     top-1 on the same training images, not augmented; their difference is the gap of the two modes
    reestimated               top-1 on the same test images as `eval_sample`, with the running averages taken anew
    variance, squared_mean    by block, at the end of training (`nfnet.analysis.signal_propagation`)
    multiply_adds             of one image
and what `transfer.measurement.unit_measures` and `batch_norm_ratios` have. A number that is not finite is left out.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nfnet.analysis.flops import multiply_adds
from nfnet.analysis.signal_propagation import residual_blocks, signal_propagation
from pipeline.data.augment.transforms import normalise
from pipeline.data.loading.data_config import DataConfig
from pipeline.data.loading.datasets import EvalData
from pipeline.errors import Diverged
from pipeline.models.backbone import load_backbone
from pipeline.records import Step
from pipeline.training.run import Run
from transfer.measurement.batch_norm_ratios import batch_norm_ratios
from transfer.measurement.unit_measures import smoothness, units
from transfer.protocol.sealed_splits import TestSplit

NUM_IMAGES = 1024
"""That are looked at, at most."""
NUM_IMAGES_OF_UNITS = 128
Measures = dict[str, float | list[float]]
Images = list[tuple[torch.Tensor, torch.Tensor]]
"""Normalised batches (N, 3, H, W), with labels."""


def of_training(steps: Sequence[Step]) -> Measures:
    """From the loop's own records: speed (the median), clipping, gradients. Diverged where the last update is not finite, which
    a training of a few updates ends with before the loop gives up."""
    if not steps:
        return {}
    if not math.isfinite(steps[-1].loss) or not math.isfinite(steps[-1].gradient_norm):
        raise Diverged(f"the update of step {steps[-1].step}, the last one that is recorded, is not finite")
    speeds = sorted(s.images_per_s for s in steps)
    found: Measures = {
        "images_per_s": speeds[len(speeds) // 2],
        "clipped_share": sum(s.clipped_share for s in steps) / len(steps),
        "gradient_norm": steps[-1].gradient_norm,
        "train_accuracy": steps[-1].accuracy,
        "train_loss": steps[-1].loss,
    }
    for name in ("clipped_share", "gradient_norm", "update_ratio"):
        values = [part.get(name) for part in steps[-1].parts.values()]
        if values and None not in values:
            found[f"{name}_by_part"] = [float(v) for v in values if v is not None]
    return found


@torch.no_grad()
def of_network(checkpoint_url: str, run: Run, test: TestSplit) -> Measures:
    """Of the network in a trial's folder, on images of its own training and of an open test split."""
    network = load_backbone(checkpoint_url).model
    config = DataConfig(url=run.data.url, convert_icc=run.data.convert_icc)
    train = _images(EvalData(config, run.augment, split=run.data.train_split, subset=run.data.subset), run)
    held = _images(EvalData(config, run.augment, split=test.name), run)
    found: Measures = {
        "eval_mode": accuracy(network.eval(), train),
        "train_mode": accuracy(copy.deepcopy(network).train(), train),
        "eval_sample": accuracy(network, held),
    }
    again = reestimated(network, [images for images, _ in train])
    if again is not None:
        found["reestimated"] = accuracy(again, held)
    images, labels = train[0]
    found |= units(network, images[:NUM_IMAGES_OF_UNITS])
    found |= smoothness(network, images, labels, run.optim.learning_rate)
    found |= batch_norm_ratios(network, run.model.name, run.model.options, images, labels)
    found["multiply_adds"] = float(multiply_adds(network, images.shape[-1]))
    try:
        residual_blocks(network)
    except ValueError:  # a chain of layers
        return found
    signal = signal_propagation(network, train[0][0][:64])
    return {
        **found,
        "variance": signal.variance,
        "squared_mean": signal.squared_mean,
        "branch_variance": signal.residual_variance,
    }


def finite(found: Measures) -> Measures:
    """Without the measures of which a number is not: a ledger takes none."""
    return {k: v for k, v in found.items() if all(map(math.isfinite, v if isinstance(v, list) else [v]))}


def accuracy(network: nn.Module, images: Images) -> float:
    hits = sum(int((network(x).argmax(1) == y).sum()) for x, y in images)
    return hits / sum(len(y) for _, y in images)


def reestimated(network: nn.Module, images: Sequence[torch.Tensor]) -> nn.Module | None:
    """A copy whose running averages are the plain means over these batches; None where it keeps none."""
    again = copy.deepcopy(network).train()
    norms = [m for m in again.modules() if hasattr(m, "running_mean") and getattr(m, "momentum", None)]
    for index, batch in enumerate(images):
        for norm in norms:
            norm.momentum = 1 / (index + 1)  # type: ignore[assignment]
        again(batch)
    return again.eval() if norms else None


def _images(data: EvalData, run: Run) -> Images:
    """Whole batches of the size that training has, so that groups of samples are as they were."""
    batch = run.batch_plan(1)[0]
    found: Iterator[tuple[torch.Tensor, torch.Tensor]] = (
        (normalise(b.images, run.augment, torch.device("cpu")), b.labels) for b in data.batches(batch)
    )
    taken = [(x, y) for x, y in itertools.islice(found, max(1, NUM_IMAGES // batch)) if len(y) == batch]
    if not taken:
        raise ValueError(f"{data.split} has fewer images than a batch of {batch}")
    return taken
