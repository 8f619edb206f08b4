"""Play the scenarios on one configuration, some at a time, in a folder that goes with them."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from orchestration.operations.drill import evidence
from orchestration.operations.drill.card import Card, Result
from orchestration.operations.drill.commands import kill_marked
from orchestration.operations.drill.crashes import without_data
from orchestration.operations.drill.evidence import Lost
from orchestration.operations.drill.own_data import EMBEDDED, copy_of
from orchestration.operations.drill.own_run import shrunk
from orchestration.operations.drill.play import Play, Stage
from orchestration.operations.drill.scenarios import Scenario, not_playable
from orchestration.tracking.tracking_uri import sqlite_uri
from pipeline import places
from pipeline.errors import UserError
from pipeline.training.run import Run

MAX_AT_ONCE = 4
UNDISTURBED = Scenario(
    "undisturbed", "nothing", "the run ends with 0 and its ledger adds up", lambda play: without_data(play, "")
)

Heard = Callable[[Result], None]


def drill(
    run: Run,
    scenarios: Sequence[Scenario],
    *,
    num_images: int,
    num_ranks: int,
    num_at_once: int,
    folder: Path | None,
    heard: Heard,
) -> Card:
    """Plays each scenario on the small form of `run`.

    Args:
        num_images: of the training data that the durations of `run` are for.
        num_at_once: scenarios at a time.
        folder: stays, with all logs; None = a temporary folder, which goes.
        heard: called with each result as it comes, on any thread.
    Raises:
        UserError: the configuration cannot be drilled, or does not run undisturbed.
    """
    begin_s = time.monotonic()
    with _folder(folder) as root:
        data = copy_of(run.data, root, num_images=num_images)
        small = shrunk(run, num_images=num_images, num_ranks=num_ranks, data=data)
        small.batch_plan(num_ranks)
        mark = secrets.token_hex(8)
        # What the check at the start finds, it finds in the undisturbed run: it takes a tenth of all of a drill.
        unchecked = replace(small, engine=replace(small.engine, parity_check=False))
        stage = Stage(unchecked, num_ranks, root, sqlite_uri(root / "mlflow.db"), mark)
        skip = {s.name: why for s in scenarios if (why := not_playable(s, num_ranks))}
        played = [s for s in scenarios if s.name not in skip]
        with _killing(mark):
            results = [_undisturbed(stage, small, heard)]
            if results[0].survived:
                results += _play_all(stage, played, min(num_at_once, MAX_AT_ONCE), heard)
        if not results[0].survived:
            skip = {s.name: "the run does not end undisturbed" for s in scenarios}
        text = (
            f"{run.name}: {small.duration} of {small.global_batch} images on {num_ranks} processes, {small.model.name} at "
            f"{small.augment.image_px} px, ZeRO stage {small.engine.zero_stage}, {small.engine.precision}, "
            f"{small.batch_plan(num_ranks)[1]} accumulated; data: {run.data.url or EMBEDDED}"
        )
        return Card(run=text, results=results, not_played=skip, seconds_s=time.monotonic() - begin_s)


def _undisturbed(stage: Stage, run: Run, heard: Heard) -> Result:
    """The run that all others are compared with. UserError where it is refused: its configuration is the user's to mend."""

    def play(play: Play) -> None:
        play.run = run
        without_data(play, "")
        stage.undisturbed[""] = evidence.final_state(play.checkpoints, num_steps=stage.num_steps)
        play.expect_account()

    result = _play(stage, UNDISTURBED, play, heard)
    if result.codes == (2,):
        raise UserError(f"the configuration does not run undisturbed: {result.reason}")
    return result


def _play_all(stage: Stage, scenarios: Sequence[Scenario], num_at_once: int, heard: Heard) -> list[Result]:
    with ThreadPoolExecutor(num_at_once, thread_name_prefix="drill") as pool:
        futures = [pool.submit(_play, stage, scenario, scenario.play, heard) for scenario in scenarios]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stage.is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            kill_marked(stage.mark)  # whoever waits for a command goes on, and ends
            raise


def _play(stage: Stage, scenario: Scenario, action: Callable[[Play], None], heard: Heard) -> Result:
    begin_s, reason = time.monotonic(), ""
    play = Play(stage, scenario.name)
    try:
        if scenario.needs_undisturbed:
            _skipping(stage, scenario.needs_undisturbed, play)
        action(play)
        play.expect_nothing_left()
    except (Lost, OSError, UserError) as error:  # a file that should be there is not, or does not read
        reason = str(error) or type(error).__name__
    finally:
        play.group.kill()
    result = Result(
        name=scenario.name,
        done=scenario.done,
        expected=scenario.expected,
        happened=tuple(play.happened),
        codes=tuple(play.codes),
        survived=not reason,
        reason=reason,
        seconds_s=time.monotonic() - begin_s,
    )
    heard(result)
    return result


def _skipping(stage: Stage, skipped: str, asked_by: Play) -> None:
    """The undisturbed run of which these data were skipped by name."""
    play = Play(stage, f"undisturbed-{asked_by.folder.name}")
    try:
        without_data(play, skipped)
        stage.undisturbed[skipped] = evidence.final_state(play.checkpoints, num_steps=stage.num_steps)
    finally:
        play.group.kill()


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with places.temporary_folder("drill") as folder:
            yield folder
        return
    try:
        kept.mkdir(parents=True, exist_ok=True)
        is_empty = not any(kept.iterdir())
    except OSError as error:
        raise UserError(f"{kept} cannot be made ({error.strerror}); give another folder with --keep") from None
    if not is_empty:
        raise UserError(f"{kept} is not empty; give a new folder with --keep")
    yield kept.resolve()


@contextlib.contextmanager
def _killing(mark: str) -> Iterator[None]:
    """However it ends, no process of the drill stays."""
    try:
        yield
    finally:
        kill_marked(mark)
