"""The Run: one frozen description of a training run, round trip to YAML, unknown keys refused.

Each part is declared beside the code that it configures and only composed here. A recipe (`pipeline.recipes`) is a function
that returns a whole Run; a fine-tuning trial (`transfer.finetune`) makes one too. There is no second configuration: the
DeepSpeed dictionary is derived from the Run in `pipeline.deepspeed_setup`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from pipeline.backbone import ModelConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.deepspeed_setup import EngineConfig
from pipeline.duration import Duration
from pipeline.errors import UserError
from pipeline.hang import WatchdogConfig
from pipeline.redact import refuse_secrets
from pipeline.saver import SavingConfig
from pipeline.update import OptimConfig


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


def to_dict(value: Any) -> Any:
    """Plain containers (as YAML and JSON hold them) of a configuration dataclass."""
    if isinstance(value, Duration):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


def from_dict(kind: type, data: Any, path: str = "") -> Any:
    """The dataclass `kind` from plain containers. Raises UserError naming the field, and the nearest name if unknown."""
    if not isinstance(data, dict):
        raise UserError(f"{path or kind.__name__} must be a mapping of fields, not {data!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise UserError(unknown_field(f"{path}.{key}" if path else str(key), str(key), fields))
    required = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in data
    ]
    if required:
        raise UserError(f"{path or 'the configuration'} lacks {', '.join(required)}; set it")
    values = {k: _coerce(hints[k], v, f"{path}.{k}" if path else k) for k, v in data.items()}
    return kind(**values)


def unknown_field(path: str, key: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"the fields here are {', '.join(known)}"
    return f"no field {path!r} in the configuration; {hint}"


def _coerce(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in options:
                return None
            raise UserError(f"{path} must not be empty")
        return _coerce(next(o for o in options if o is not type(None)), value, path)
    if hint is Duration:
        return value if isinstance(value, Duration) else Duration.parse(value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise UserError(f"{path} is {value!r}; choose one of {choices}")
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise UserError(f"{path} must be a list, not {value!r}")
        return tuple(_coerce(typing.get_args(hint)[0], v, path) for v in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{path} must be a mapping, not {value!r}")
        return dict(value)
    return _scalar(hint, value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UserError(f"{path} must be true or false, not {value!r}")
    try:
        if hint is int:
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(value)
        if hint is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
    except (TypeError, ValueError):
        kind = "a whole number" if hint is int else "a number"
        raise UserError(f"{path} must be {kind}, not {value!r}") from None
    if hint is str:
        if not isinstance(value, str):
            raise UserError(f"{path} must be text, not {value!r}")
        return value
    return value


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
