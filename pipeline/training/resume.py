"""Where a run in a folder goes on, and whether it is the one that the folder holds: configuration, data, length.

run.yaml         the Run of the last start; fields that decide numbers must be the same, but for the length and for places
identity.json    what the run was made of (`pipeline.training.identity`)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.checkpoint import load, retention, unsaved
from pipeline.checkpoint.commit import Commit
from pipeline.configuration import from_dict
from pipeline.data.loading.datasets import TrainData
from pipeline.distributed import World, from_main
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.errors import UserError
from pipeline.records import Changed, PassedOver, Record
from pipeline.storage import objects
from pipeline.training import identity
from pipeline.training.identity import Identity
from pipeline.training.run import Run, dump_yaml, flat, load_yaml
from pipeline.yaml_files.parse import read_yaml

NAME = "run.yaml"
CHANGEABLE = (
    "duration",
    "data.url",
    "micro_batch",
    "log_every_steps",
    "save_every",
    "eval_every",
    "keep_checkpoints",
    "saving",
    "watchdog",
    "join",
    "engine",
    "data.num_workers",
    "data.read_threads",
    "data.read_ahead_mb",
    "data.cache_dir",
    "data.cache_gb",
    "data.max_lost_share",
    "data.max_lost_samples",
    "data.skip_steps",
)
"""Fields that a restarted run may change: none of them decides which update comes next, but for data.skip_steps, which is
there to change it, for the duration, and for what rounds otherwise (`ROUNDING`); all are reported. Data may lie elsewhere if
they are the same."""
ROUNDING = ("compile", "precision", "tf32")
"""Fields of the engine by which the same update is rounded otherwise."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run folder holds for a start."""

    commit: Commit | None
    """To go on from."""
    records: Sequence[Record] = ()
    names: Sequence[str] = ()
    """Of the data's sources in the run's account: where they lay when the run began."""


def find(
    run: Run, out: str, data: TrainData, *, world: World, cache_dir: str, num_steps: Callable[[Duration], int]
) -> Found:
    """The folder made this run's, and where it goes on. A collective; rank 0 looks and writes.

    UserError where the folder holds another run, or nothing that can go on.
    """
    folder = from_main(world, lambda: _look(run, out, data))
    commit, passed = newest(out, cache_dir, world)
    return from_main(
        world, lambda: _continue(run, out, folder, commit, passed, cache_dir=cache_dir, num_steps=num_steps)
    )


class _Folder(NamedTuple):
    """What a run folder says of its run, which is no other than this one."""

    earlier: Run | None
    before: Identity | None
    now: Identity

    def refuse_other_data(self, out: str, checkpoint: Commit) -> None:
        digest = str(checkpoint.dataset.get("digest", ""))
        identity.refuse_other_data(out, self.now, digest=digest, classes=checkpoint.classes, before=self.before)


def _look(run: Run, out: str, data: TrainData) -> _Folder:
    place = objects.join(out, NAME)
    earlier = load_yaml(read_yaml(place), place) if objects.exists(place) else None
    if earlier is not None:
        _refuse_other_fields(out, earlier, run)
    now, before = identity.of_run(data), identity.read(out)
    if before is not None:
        identity.refuse_other_data(out, now, digest=before.data_digest, classes=before.classes, before=before)
    return _Folder(earlier, before, now)


def _continue(
    run: Run,
    out: str,
    folder: _Folder,
    commit: Commit | None,
    passed: list[PassedOver],
    *,
    cache_dir: str,
    num_steps: Callable[[Duration], int],
) -> Found:
    earlier, before, now = folder

    def refuse_kept(checkpoint: Commit) -> None:
        if earlier is None:
            raise UserError(f"{out} holds no run yet")
        _refuse_other_fields(out, from_dict(Run, checkpoint.config), run)
        folder.refuse_other_data(out, checkpoint)

    changed: dict[str, str] = {}
    if before is not None:
        changed = identity.changes(before, now)
        carried = {name: getattr(before, name) for name in ("initial_weights", "names", "micro_batches")}
        now = dataclasses.replace(now, **carried)
    if commit is not None:
        folder.refuse_other_data(out, commit)
    commit, handed_in = unsaved.hand_in(out, commit, cache_dir=cache_dir, refuse=refuse_kept)
    step = commit.step if commit else 0
    if num_steps(run.duration) < step:
        raise UserError(
            f"{out} has done {step} steps, and {run.duration} are {num_steps(run.duration)}; set --duration to at least "
            f"'{step} steps', or give another folder with --out"
        )
    if earlier is not None and num_steps(earlier.duration) != num_steps(run.duration):
        changed["length"] = _other_length(run, step, num_steps(earlier.duration), num_steps(run.duration), num_steps)
    if earlier is not None:
        changed |= _other_rounding(earlier.engine, run.engine)
    if earlier is None or _told(earlier) != _told(run):
        objects.write_bytes(objects.join(out, NAME), dump_yaml(run).encode())
    if now != before:
        identity.write(out, now)
    records = [*passed, *handed_in, *(Changed(step=step, what=what, text=text) for what, text in changed.items())]
    return Found(commit=commit, records=records, names=now.names)


def _told(run: Run) -> tuple[object, ...]:
    """What a later start compares with the run's file."""
    return run.duration, run.data.sources(), *(getattr(run.engine, name) for name in ROUNDING)


def _other_rounding(before: EngineConfig, now: EngineConfig) -> dict[str, str]:
    return {
        f"engine.{name}": f"engine.{name} is {getattr(now, name)} now, and was {getattr(before, name)}: from here on numbers "
        "differ by rounding from those of a run that had not changed it"
        for name in ROUNDING
        if getattr(now, name) != getattr(before, name)
    }


def newest(out: str, cache_dir: str, world: World) -> tuple[Commit | None, list[PassedOver]]:
    """The newest checkpoint that verifies, and those that were passed over, marked as damaged. A collective."""
    commit, passed = load.newest(out, cache_dir, world)
    if passed and commit is None:  # starting over would throw the work away without a word
        raise UserError(
            f"{out} holds {len(passed)} checkpoints and none verifies ({passed[0].reason}); "
            "restore one, or start over in another folder with --out"
        )
    return commit, from_main(world, lambda: [retention.mark_damaged(bad) for bad in passed])


def refuse_other_network(commit: Commit, shapes: Mapping[str, Sequence[int]], types: Mapping[str, str]) -> None:
    """UserError with the first difference, unless a checkpoint's parameters and buffers are those of the network here: another
    release of a library may build another one under the same name.

    Args:
        shapes: of the network's parameters and buffers.
        types: of its buffers, as safetensors calls them.
    """
    had = {name: f"{commit.buffers.get(name, 'F32')} {list(shape)}" for name, shape in commit.shapes.items()}
    has = {name: f"{types.get(name, 'F32')} {list(shape)}" for name, shape in shapes.items()}
    for name in [*had, *has]:
        if had.get(name) != has.get(name):
            raise UserError(
                f"checkpoint {commit.url} has {name} as {had.get(name, 'nothing')}, and the network here as "
                f"{has.get(name, 'nothing')}; resume with the code and libraries of before, or give another folder with --out"
            )


def _refuse_other_fields(out: str, earlier: Run, run: Run) -> None:
    theirs, ours = flat(earlier), flat(run)
    for name, value in ours.items():
        if value != theirs.get(name) and not any(name == c or name.startswith(f"{c}.") for c in CHANGEABLE):
            raise UserError(
                f"{out} holds a run with {name} = {theirs.get(name)!r}, this one has {value!r}; "
                f"give another folder with --out, or the same settings to resume"
            )


def _other_length(run: Run, step: int, before: int, now: int, num_steps: Callable[[Duration], int]) -> str:
    """In words, with what it does to the learning rate."""
    warmup = num_steps(run.optim.warmup)
    text = f"the run is {now:,} steps long now, and was {before:,}"
    if not step or step >= now:
        return text
    was = run.optim.rate(step - 1, total_steps=before, warmup_steps=warmup)
    is_ = run.optim.rate(step, total_steps=now, warmup_steps=warmup)
    if was == is_:
        return f"{text}; the learning rate goes on as {is_:.4g}"
    end = "had ended" if step >= before else f"was that of {before:,} steps"
    return (
        f"{text}: its {run.optim.schedule} schedule {end}, and is that of {now:,} steps from step {step:,} on, where the "
        f"learning rate jumps from {was:.4g} to {is_:.4g}; a run of {now:,} steps from its beginning would be another one"
    )
