"""Signs of life: each uploader renews a tag with the time, and whoever lives ends the runs of those that fell silent.

A trainer's death is reported by its own uploader. When both are gone (the machine died, or lost its network) only others can
say so: every uploader looks after the runs next to its own, `normfree ui` after all that it shows, `normfree track status`
after a whole server. A run is marked when its sign has stood still for SILENT_S by the marker's own watch, or when it is
that old by the clock and does not move during SECOND_LOOK_S: two machines' clocks need not agree for a living run to be
left alone. A run that was marked in error (its machine was only cut off) takes the verdict back with its next sign.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

BEAT_TAG = "heartbeat_s"
CAUSE_TAG = "status.cause"
BEAT_EVERY_S = 30.0
SILENT_S = 90.0
SECOND_LOOK_S = 40.0  # longer than a sign of life takes to be renewed
LOOK_EVERY_S = 20.0  # 90 + 20 s and the time of a search: within two minutes


def beat_now() -> dict[str, str]:
    """The tag of this moment."""
    return {BEAT_TAG: str(round(time.time()))}


def beat(client: Any, run_id: str, *, revive: bool) -> None:
    """Renew the sign of life; with `revive` a run that somebody has ended by mistake is RUNNING again."""
    for key, value in beat_now().items():
        client.set_tag(run_id, key, value)
    if not revive:
        return
    run = client.get_run(run_id)
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    if CAUSE_TAG in run.data.tags:
        client.delete_tag(run_id, CAUSE_TAG)


class Sweeper:
    """Looks after the runs of one server; keep it, for what it has seen before is what it judges by."""

    def __init__(self, watch: Callable[[], float] = time.monotonic, clock: Callable[[], float] = time.time) -> None:
        self._watch, self._clock = watch, clock
        self._seen: dict[str, tuple[str, float]] = {}
        """Of each running run: its sign, and when by our watch we saw that one first."""
        self.num_suspects = 0
        """Old by the clock, and not looked at for long enough to be sure."""

    def look(self, client: Any, experiments: list[str], *, spare: str | None = None) -> list[tuple[str, str]]:
        """Ends the runs that fell silent, as FAILED with the cause; their (id, cause). `spare` is never looked at."""
        now, marked, running = self._watch(), [], {}
        self.num_suspects = 0
        for run in _running(client, experiments):
            sign = run.data.tags.get(BEAT_TAG)
            if sign is None or run.info.run_id == spare:
                continue  # without a sign it is not one of ours
            before = self._seen.get(run.info.run_id)
            first = before[1] if before is not None and before[0] == sign else now
            running[run.info.run_id] = sign, first
            still_s, age_s = now - first, self._clock() - float(sign)
            if still_s >= SILENT_S or (still_s >= SECOND_LOOK_S and age_s >= SILENT_S):
                cause = _end(client, run.info.run_id, sign)
                marked += [(run.info.run_id, cause)] if cause else []
            elif age_s >= SILENT_S:
                self.num_suspects += 1
        self._seen = running
        return marked


def sweep_once(
    client: Any, experiments: list[str], wait: Callable[[float], None] = time.sleep
) -> list[tuple[str, str]]:
    """One look, and where something is suspect a second one SECOND_LOOK_S later."""
    sweeper = Sweeper()
    marked = sweeper.look(client, experiments)
    if sweeper.num_suspects:
        wait(SECOND_LOOK_S)
        marked += sweeper.look(client, experiments)
    return marked


def keep_sweeping(connect: Callable[[], Any], end: threading.Event, *, every_s: float = LOOK_EVERY_S) -> None:
    """Looks at all experiments of a server until `end` is set; a server that does not answer is asked again later."""
    sweeper = Sweeper()
    while not end.wait(jittered(every_s)):
        try:
            client = connect()
            sweeper.look(client, all_experiments(client))
        except Exception:  # whatever it is, it will be there or gone at the next look
            continue


def keep_beating(connect: Callable[[], Any], run_id: str, end: threading.Event) -> None:
    """Signs of life from a thread, for a process that is no uploader, until `end` is set. Never raises."""
    while True:
        with contextlib.suppress(Exception):  # the next sign will do
            beat(connect(), run_id, revive=True)
        if end.wait(BEAT_EVERY_S):
            return


def jittered(every_s: float) -> float:
    """So that the uploaders of a hundred runs do not ask in step."""
    return every_s * random.uniform(0.8, 1.0)


def all_experiments(client: Any) -> list[str]:
    return [experiment.experiment_id for experiment in pages(client.search_experiments)]


def _running(client: Any, experiments: list[str]) -> list[Any]:
    if not experiments:
        return []
    return pages(lambda **page: client.search_runs(experiments, "attributes.status = 'RUNNING'", **page))


def pages(search: Callable[..., Any]) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = search(page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _end(client: Any, run_id: str, sign: str) -> str | None:
    run = client.get_run(run_id)  # once more: it may have ended, or given a sign, since the search
    if run.info.status != "RUNNING" or run.data.tags.get(BEAT_TAG) != sign:
        return None
    since = datetime.fromtimestamp(float(sign), UTC).isoformat(timespec="seconds")
    cause = f"no heartbeat since {since}: it was killed, or its machine failed or is cut off from this server"
    client.set_tag(run_id, CAUSE_TAG, cause)
    client.set_terminated(run_id, status="FAILED", end_time=round(1000 * float(sign)))
    return cause
