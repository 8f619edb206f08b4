"""A Run: everything that decides a training, and its YAML."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pipeline.checkpoint.saving_config import SavingConfig
from pipeline.configuration import check_fields, convert, dataclass_of, from_dict, hints, to_dict, unknown_field
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.field_types import Count, CountOrZero, Items, PositiveDuration, Text
from pipeline.models.backbone import ModelConfig
from pipeline.secrets import refuse_secrets
from pipeline.supervision.hang_detection import WatchdogConfig
from pipeline.yaml_files.parse import parse_yaml
from pipeline.yaml_files.refusals import located


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """What the hosts of a run are compared in before it starts."""

    allow: Annotated[tuple[Literal["code", "libraries", "devices", "clock", "disk"], ...], Items(distinct=True)] = ()
    """Differences between hosts, and a disk with too little room, that are reported and not refused: code, libraries, devices,
    clock, disk. Configuration, data and the run folder must be the same."""

    def __post_init__(self) -> None:
        check_fields(self, "join")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides the numbers of a run (and nothing about who watches it)."""

    name: Text
    """For people, and for MLflow."""
    seed: CountOrZero = 0
    """Of the weights, the order of the data and its augmentation."""
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    global_batch: Count
    """Samples per update over all ranks; micro-batch and accumulation are derived from it."""
    micro_batch: CountOrZero | Literal["auto"] = 0
    """Samples per forward pass on one rank; 0 = the largest share, no accumulation; auto = the largest that fits, found when the
    run starts."""
    duration: PositiveDuration
    """Of the whole run."""
    eval_every: PositiveDuration | None = None
    """None = only at the end."""
    save_every: PositiveDuration | None = None
    """None = only at the end."""
    log_every_steps: Count = 10
    """Updates between two records of the training."""
    save_final: bool = True
    """Trials of a sweep keep no checkpoint unless asked."""
    keep_checkpoints: Count = 2
    """Newest committed checkpoints that are kept; `saving` may keep more."""
    saving: SavingConfig = field(default_factory=SavingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    join: JoinConfig = field(default_factory=JoinConfig)

    def __post_init__(self) -> None:
        refuse_secrets(to_dict(self), "the configuration")
        check_fields(self)
        if self.engine.compile != "none" and self.model.batch_norm == "synchronised":
            raise UserError(
                f"engine.compile is {self.engine.compile} and model.batch_norm synchronised, whose exchange between ranks no "
                "graph holds; set engine.compile to none, or model.batch_norm to local"
            )

    def batch_plan(self, num_ranks: int) -> tuple[int, int]:
        """(micro_batch, accumulation) for this many ranks; their product with `num_ranks` is `global_batch`."""
        if self.global_batch % num_ranks:
            raise UserError(
                f"global_batch {self.global_batch} does not divide over {num_ranks} processes; "
                f"set global_batch to a multiple of {num_ranks}, or change the number of processes"
            )
        share = self.global_batch // num_ranks
        if self.micro_batch == "auto":
            micro = self.micro_batches(num_ranks)[0]
            return micro, share // micro
        micro = self.micro_batch or share
        if share % micro:
            raise UserError(
                f"micro_batch {micro} does not divide the {share} samples that each of {num_ranks} processes gets "
                f"of global_batch {self.global_batch}; set micro_batch to a divisor of {share}"
            )
        return micro, share // micro

    def micro_batches(self, num_ranks: int) -> list[int]:
        """Those that the run may have on so many ranks, largest first.

        Raises:
            UserError: there is none.
        """
        share, multiple = self.global_batch // num_ranks, self.augment.micro_batch_multiple
        distinct = self.global_batch // self.data.repeats if self.data.order == "lanes" else share
        found = [n for n in range(share, 0, -1) if not (share % n or n % multiple or distinct % n)]
        if not found:
            raise UserError(
                f"micro_batch is auto, and no part of the {share} samples of each of {num_ranks} processes is a multiple of "
                f"{multiple}, as augment.mixup_alpha and augment.cutmix_alpha need; choose another global_batch"
            )
        return found

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form: equal digests, equal configurations."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()


def flat(run: Run) -> dict[str, Any]:
    """Fields by their dotted paths; of further datasets their weights alone, as they may lie elsewhere."""
    flat: dict[str, Any] = {}

    def enter(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                enter(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value

    enter(to_dict(run), "")
    flat["data.mixture"] = [f"dataset {i} = {weight}" for i, (_, weight) in enumerate(run.data.sources())][1:]
    return flat


def override(run: Run, dotted: dict[str, Any]) -> Run:
    """A Run with fields replaced by dotted path ("optim.learning_rate": "0.4"), refusing paths that do not exist."""
    data = to_dict(run)
    for path, value in dotted.items():
        *parents, last = path.split(".")
        place: dict[str, Any] = data
        kind: type | None = Run
        for i, part in enumerate(parents):
            _check_name(kind, part, path)
            kind = dataclass_of(hints(kind)[part]) if kind is not None else None
            place[part] = {} if place.get(part) is None else place[part]
            place = place[part]
            if not isinstance(place, dict):
                raise UserError(f"{'.'.join(parents[: i + 1])} has no fields of its own; set it as one value")
        _check_name(kind, last, path)
        place[last] = value if kind is None else convert(hints(kind)[last], value, path)
    return from_dict(Run, data)


def _check_name(kind: type | None, name: str, path: str) -> None:
    """`kind` None: a mapping with names of its own."""
    if kind is not None and name not in hints(kind):
        raise UserError(unknown_field(path, name, hints(kind)))


def dump_yaml(run: Run) -> str:
    import yaml

    return yaml.safe_dump(to_dict(run), sort_keys=False, allow_unicode=True)


def load_yaml(data: str | bytes, where: str) -> Run:
    """The Run in a YAML document. Raises UserError with `where`, the line and the field."""
    content = parse_yaml(data, where)
    with located(where, data):
        return from_dict(Run, content)
