"""Whether a run fits together, before anything of it starts: its parts, its processes, its network and its data."""

from typing import cast

import torch

from pipeline import places
from pipeline.compilation.passes import blocks_of
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import samples_per_epoch
from pipeline.engine import optimisers
from pipeline.engine.deepspeed_engine import recompute_blocks
from pipeline.errors import UserError
from pipeline.models import timm_models, trunks
from pipeline.models.backbone import make
from pipeline.models.batch_norm import set_statistics
from pipeline.storage import objects
from pipeline.training.run import Run


def check_run(run: Run, *, num_ranks: int = 1, read_data: bool = True) -> None:
    """Raises UserError naming the field that does not fit.

    Args:
        read_data: read the dataset's manifest too; without it durations are compared where their units allow it.
    """
    micro_batch, _ = run.batch_plan(num_ranks)
    run.augment.check_micro_batch(micro_batch)
    if run.global_batch % run.data.repeats:
        raise UserError(
            f"global_batch is {run.global_batch} and data.repeats {run.data.repeats}; set global_batch to a multiple of "
            "data.repeats, so that a batch holds all copies of an image"
        )
    if run.saving.keep_best and run.data.eval_split is None:
        raise UserError("saving.keep_best needs evaluations, and data.eval_split is none; set one of the two")
    run.optim.check_engine(run.engine.zero_stage)
    check_network(run)
    if read_data:
        check_loss(run)
    check_durations(run, samples_per_epoch(run.data) if read_data else None)


def check_loss(run: Run) -> None:
    """Several labels an image need a loss of each by itself."""
    url = run.data.url
    manifest = Manifest.open(url)
    if manifest.masks or manifest.boxes:
        what = "each pixel" if manifest.masks else "each box"
        raise UserError(
            f"{what} of {url} has a class, and an image has none to train on; measure it: normfree transfer"
        )
    if run.optim.loss != "binary" and manifest.labels:
        raise UserError(f"optim.loss is {run.optim.loss}, and an image of {url} has several labels; set it to binary")


def check_network(run: Run) -> None:
    """The network as a skeleton without memory: its name, its options and, for timm's, its input size."""
    name, px = run.model.name, run.augment.image_px
    with torch.device("meta"):
        model = set_statistics(make(name, 1000, run.model.options), run.model.batch_norm)
    if run.engine.compile == "blocks":
        blocks_of(model)
    recompute_blocks(model, run.engine)
    trunks.check_batch(model, run.global_batch if run.micro_batch in (0, "auto") else cast(int, run.micro_batch))
    optimisers.freeze(model, run.optim)
    optimisers.settings(model, run.optim)
    if timm_models.is_timm(name):
        try:
            model.eval()(torch.zeros(1, 3, px, px, device="meta"))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(
                f"augment.image_px is {px}, which {name} does not take ({(str(error).splitlines() or [''])[0]}); set it to "
                "the network's own size, or model.options.img_size to this one"
            ) from None


def check_durations(run: Run, epoch_samples: int | None) -> None:
    """A warm-up that ends within the run.

    Args:
        epoch_samples: positions of an epoch; None where nobody knows them yet: what only they decide is passed over.
    """
    warmup, duration = run.optim.warmup, run.duration
    if epoch_samples is None:
        if warmup.unit != duration.unit and "epochs" in (warmup.unit, duration.unit) and warmup.value:
            return
        epoch_samples = 1000 * run.global_batch  # of two in epochs, any size finds the longer one
    sizes = {"samples_per_epoch": epoch_samples, "global_batch": run.global_batch}
    if warmup.steps(**sizes) > duration.steps(**sizes):
        raise UserError(
            f"optim.warmup is {warmup} ({warmup.steps(**sizes):,} steps), longer than the run's duration of {duration} "
            f"({duration.steps(**sizes):,} steps); shorten --optim.warmup or lengthen --duration"
        )


def check_room(run: Run, out: str) -> str:
    """Why the disk of `out` is too small for one checkpoint of the run, or nothing; a store is not asked."""
    if not objects.is_local(out) or not (run.save_every or run.save_final):
        return ""
    with torch.device("meta"):
        model = make(run.model.name, len(Manifest.open(run.data.url).outputs), run.model.options)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    needed_bytes = 4 * num_weights * run.optim.num_states
    folder = objects.local_path(out).absolute()
    free_bytes = places.free_bytes(folder)
    if free_bytes > needed_bytes:
        return ""
    return (
        f"{folder} has {free_bytes / 1e9:.3g} GB free, and a checkpoint of this run takes {needed_bytes / 1e9:.3g} GB; make room "
        "there, or give another folder with --out"
    )
