"""`normfree status`: what a run is, whether it lives, how far it is, what it has saved, what went wrong, and how it goes on."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from orchestration.operations import run_folder
from orchestration.operations.timeline import first_error, timeline
from orchestration.spool.spool import records_folder
from orchestration.tracking.tracking_uri import server_uri, sqlite_file
from pipeline.checkpoint.commit import COMMIT, Commit, checkpoints_url, place_in_order, read_commit
from pipeline.errors import UserError
from pipeline.secrets import public
from pipeline.storage import listing, objects, ownership
from pipeline.storage.ownership import Record

TROUBLES = ("SaveFailed", "SaveSkipped", "Skipped", "RolledBack", "PassedOver", "Lost", "Deviation")
LOOKED_AT = 5
"""Checkpoints, from the newest on, that are looked at for one that stands."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the run."""

    number: int
    time_s: float
    host: str
    pid: int
    step: int | None
    ending: str
    """runs, finished, stopped, failed, hang, gone"""
    why: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The newest checkpoint that stands."""

    url: str
    step: int
    age_s: float | None
    size_bytes: int
    verified: str
    """sizes: its files are there, of the committed sizes; bytes: all of them have the committed SHA-256."""
    passed_over: list[str]
    """Newer ones that do not stand, and why."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    what: str
    name: str
    url: str
    state: str
    """running, starting, finished, stopped, failed, hang, gone (killed, without a word), new"""
    is_alive: bool
    owner: dict[str, Any] | None
    """host, pid, since_s, beat_age_s"""
    step: int
    total_steps: int | None
    images_per_s: float | None
    left_s: float | None
    loss: float | None
    evaluation: dict[str, float]
    checkpoint: Saved | None
    num_checkpoints: int
    starts: list[Start] = field(default_factory=list)
    troubles: dict[str, int] = field(default_factory=dict)
    last_trouble: str = ""
    first_error: str = ""
    mlflow: str = ""
    resume_command: str = ""
    """The command; "" while it runs, and when it has finished."""
    notes: list[str] = field(default_factory=list)


def run_status(url: str, *, verify: bool = False, brief: bool = False) -> RunStatus:
    """Of the run in the folder `url`.

    Args:
        verify: read all bytes of the newest checkpoint.
        brief: for a line of many: no logs are read, and no owner is watched.
    """
    records, owner = run_folder.records(url), ownership.look(url)
    alive = owner is not None and (_seems_alive(owner) if brief else ownership.is_alive(url, owner))
    hangs = [] if brief else run_folder.hangs(url)
    starts = _starts(records.events, hangs, alive)
    started = _last(records.events, "Started")
    # Of this start alone: an earlier one may have been farther.
    steps = [s for s in records.last_steps if not starts or s.get("attempt") == starts[-1].number]
    step = steps[-1] if steps else None
    evaluation = _last(records.events, "Evaluation")
    saved, num = _checkpoint(url, records.events, verify=verify)
    total = _int(started, "total_steps")
    done = max(_int(step, "step") or 0, saved.step if saved and not alive else 0)
    troubles = [r for r in records.events if r["kind"] in TROUBLES]
    error = None if brief else first_error(timeline(url))
    state = starts[-1].ending if starts else ("starting" if alive else "new")
    state = {"runs": "running" if step is not None else "starting"}.get(state, state)
    times = [t for s in steps if (t := _float(s, "step_s")) is not None]
    return RunStatus(
        what="run",
        name=str((started or {}).get("run_name", "")),
        url=url,
        state=state,
        is_alive=alive,
        owner=owner_facts(owner),
        step=done,
        total_steps=total,
        images_per_s=_float(step, "images_per_s"),
        left_s=(total - done) * median(times) if alive and times and total else None,
        loss=_float(records.last_steps[-1] if records.last_steps else None, "loss"),
        evaluation={n: v for n in ("loss", "top1", "top5") if (v := _float(evaluation, n)) is not None},
        checkpoint=saved,
        num_checkpoints=num,
        starts=starts,
        troubles={kind: n for kind in TROUBLES if (n := sum(r["kind"] == kind for r in troubles))},
        last_trouble=str(troubles[-1].get("reason") or troubles[-1].get("text") or "") if troubles else "",
        first_error=error.text if error else "",
        mlflow=mlflow_link(url),
        resume_command="" if alive or state == "finished" else resume_command(url, records.events),
        notes=[] if records.is_whole else ["its records are long, and their middle was not read: starts may be more"],
    )


def _starts(events: list[dict[str, Any]], hangs: list[dict[str, Any]], alive: bool) -> list[Start]:
    found: list[Start] = []
    bounds = [*(i for i, r in enumerate(events) if r["kind"] == "Attempt"), len(events)]
    for begin, end in pairwise(bounds):
        head, rest = events[begin], events[begin:end]
        ending, why = _ending(rest)
        is_last = end == len(events)
        until_s = float("inf") if is_last else float(events[end]["time_s"])
        frozen = [h for h in hangs if float(head["time_s"]) <= float(h["time_s"]) < until_s]
        if not ending and is_last and alive:
            ending, why = "runs", ""
        elif not ending and frozen:
            ending, why = "hang", f"a rank froze: {frozen[-1]['file']}"
        elif not ending:
            ending, why = "gone", "it ended without a last word: killed, or its machine failed"
        found.append(
            Start(
                number=_int(head, "attempt") or 0,
                time_s=float(head["time_s"]),
                host=str(head.get("host", "")),
                pid=_int(head, "pid") or 0,
                step=_int(_last(rest, "Started"), "step"),
                ending=ending,
                why=why,
            )
        )
    return found


def _ending(events: list[dict[str, Any]]) -> tuple[str, str]:
    for record in reversed(events):
        if record["kind"] == "Finished":
            return "finished", ""
        if record["kind"] == "Stopped":
            return "stopped", str(record.get("reason", ""))
        if record["kind"] == "Failed":
            return "failed", public(str(record.get("error", "")))
    return "", ""


def _checkpoint(url: str, events: list[dict[str, Any]], *, verify: bool) -> tuple[Saved | None, int]:
    root = checkpoints_url(url)
    steps = {i.name: order for i in listing.items(root) if i.is_folder and (order := place_in_order(i.name))}
    passed: list[str] = []
    for name in sorted(steps, key=lambda n: steps[n], reverse=True)[:LOOKED_AT]:
        place = objects.join(root, name)
        there = {item.name: item for item in listing.items(place)}
        if COMMIT not in there:
            continue  # of a save that was cut short, or is under way
        try:
            commit = read_commit(place)
            _check_sizes(commit, there)
            if verify:
                from pipeline.checkpoint import load  # torch comes with it

                load.verify(commit, load.default_cache())
        except UserError as error:
            passed.append(str(error))
            continue
        when_s = there[COMMIT].modified_s or max(
            (float(r["time_s"]) for r in events if r["kind"] == "Saved" and r.get("step") == commit.step), default=0.0
        )
        saved = Saved(
            url=place,
            step=commit.step,
            age_s=max(0.0, time.time() - when_s) if when_s else None,
            size_bytes=commit.size_bytes,
            verified="bytes" if verify else "sizes",
            passed_over=passed,
        )
        return saved, len(steps)
    return None, len(steps)


def _check_sizes(commit: Commit, there: dict[str, listing.Item]) -> None:
    for info in commit.files:
        found = there.get(info["name"])
        if found is None or found.size_bytes != info["size_bytes"]:
            what = "is not there" if found is None else f"has {found.size_bytes:,} of {info['size_bytes']:,} bytes"
            raise UserError(f"checkpoint {commit.url} does not verify: {info['name']} {what}")


def resume_command(url: str, events: list[dict[str, Any]]) -> str:
    """The command that was typed, in its folder; of a run that does not know it one that does the same."""
    attempt = _last(events, "Attempt") or {}
    command, folder = attempt.get("environment.command"), attempt.get("environment.folder")
    if isinstance(command, str) and command and isinstance(folder, str):
        return f"cd {shlex.quote(folder)} && {command}"
    ranks = _int(_last(events, "Started"), "num_ranks") or 1
    words = ["normfree", "pretrain", objects.join(url, "run.yaml"), "--out", url]
    return shlex.join([*words, *(["--num-processes", str(ranks)] if ranks > 1 else [])])


def mlflow_link(url: str) -> str:
    """Where MLflow shows the run: an address, or the command that serves it; "" where it was never told of it."""
    folder = records_folder(url).resolve()
    known = [(name, state) for name, state in run_folder.tracking(url).items() if state.get("run_id")]
    if not known:
        return ""
    name, state = known[-1]
    uri = server_uri(name, folder)
    if uri.startswith(("http://", "https://")):
        return f"{public(uri).rstrip('/')}/#/experiments/{state.get('experiment_id', '0')}/runs/{state['run_id']}"
    file = sqlite_file(uri)
    if file is None or file.parent == folder:
        return shlex.join(["normfree", "ui", url])
    return shlex.join(["normfree", "ui", "--tracking-uri", public(uri)])


def _seems_alive(owner: Record) -> bool:
    if owner.main.is_here:
        return any(p.is_alive for p in owner.processes if p.is_here)
    return abs(time.time() - owner.beat_s) <= ownership.LIMIT_S


def owner_facts(owner: Record | None) -> dict[str, Any] | None:
    if owner is None:
        return None
    facts = {"host": owner.main.host, "pid": owner.main.pid, "what": owner.what, "since_s": owner.since_s}
    return {**facts, "beat_age_s": max(0.0, time.time() - owner.beat_s)}


def _last(events: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((r for r in reversed(events) if r["kind"] == kind), None)


def _int(record: dict[str, Any] | None, name: str) -> int | None:
    value = (record or {}).get(name)
    return value if type(value) is int else None


def _float(record: dict[str, Any] | None, name: str) -> float | None:
    value = (record or {}).get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
