"""A Run: everything that decides a training, and its YAML."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from typing import Any

from pipeline.checkpoint.saver import SavingConfig
from pipeline.configuration import from_dict, to_dict, unknown_field
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models.backbone import ModelConfig
from pipeline.secrets import refuse_secrets
from pipeline.supervision.hang_detection import WatchdogConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides the numbers of a run (and nothing about who watches it)."""

    name: str
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    global_batch: int
    """Samples per update over all ranks; micro-batch and accumulation are derived from it."""
    micro_batch: int = 0
    """Samples per forward pass on one rank; 0 = the largest share, no accumulation."""
    duration: Duration
    eval_every: Duration | None = None
    """None = only at the end."""
    save_every: Duration | None = None
    """None = only at the end."""
    log_every_steps: int = 10
    save_final: bool = True
    """Trials of a sweep keep no checkpoint unless asked."""
    keep_checkpoints: int = 2
    """Newest committed checkpoints that are kept; `saving` may keep more."""
    saving: SavingConfig = field(default_factory=SavingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        refuse_secrets(to_dict(self), "the configuration")
        if self.global_batch < 1:
            raise UserError(f"global_batch is {self.global_batch}; set it to 1 or more")
        if self.log_every_steps < 1:
            raise UserError(f"log_every_steps is {self.log_every_steps}; set it to 1 or more")
        if self.keep_checkpoints < 1:
            raise UserError(f"keep_checkpoints is {self.keep_checkpoints}; set it to 1 or more")

    def batch_plan(self, num_ranks: int) -> tuple[int, int]:
        """(micro_batch, accumulation) for this many ranks; their product with `num_ranks` is `global_batch`."""
        if self.global_batch % num_ranks:
            raise UserError(
                f"global_batch {self.global_batch} does not divide over {num_ranks} processes; "
                f"set global_batch to a multiple of {num_ranks}, or change the number of processes"
            )
        share = self.global_batch // num_ranks
        micro = self.micro_batch or share
        if share % micro:
            raise UserError(
                f"micro_batch {micro} does not divide the {share} samples that each of {num_ranks} processes gets "
                f"of global_batch {self.global_batch}; set micro_batch to a divisor of {share}"
            )
        return micro, share // micro

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form: equal digests, equal configurations."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()


def override(run: Run, dotted: dict[str, Any]) -> Run:
    """A Run with fields replaced by dotted path ("optim.learning_rate": "0.4"), refusing paths that do not exist."""
    data = to_dict(run)
    for path, value in dotted.items():
        place, kind, *_ = data, Run
        parts = path.split(".")
        for i, part in enumerate(parts):
            names = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else None
            if names is not None and part not in names:
                raise UserError(unknown_field(".".join(parts[: i + 1]), part, names))
            if i == len(parts) - 1:
                place[part] = value
                break
            kind = _inner(typing.get_type_hints(kind)[part]) if names is not None else object
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise UserError(f"{'.'.join(parts[: i + 1])} has no fields of its own; set it as one value")
    return typing.cast(Run, from_dict(Run, data))


def _inner(hint: Any) -> Any:
    return next((o for o in typing.get_args(hint) if dataclasses.is_dataclass(o)), hint)


def dump_yaml(run: Run) -> str:
    import yaml

    return yaml.safe_dump(to_dict(run), sort_keys=False)


def load_yaml(text: str, where: str) -> Run:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not readable as YAML ({' '.join(str(error).split())}); mend the file") from None
    return typing.cast(Run, from_dict(Run, data))
