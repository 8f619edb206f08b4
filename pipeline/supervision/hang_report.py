"""The report of a frozen rank: one file in the run's folder and one sentence."""

import dataclasses
import json
import threading
import time
from typing import Any

from pipeline import places
from pipeline.storage import objects
from pipeline.supervision.hang_detection import Heard, Suspect, WatchdogConfig
from pipeline.supervision.stack_dumps import MAIN

PHASES = {
    "start": "starting",
    "wait": "waiting for a batch",
    "transfer": "handing a batch to the device",
    "compute": "forward, backward or update",
    "save": "saving",
    "log": "showing or recording what happened",
    "evaluate": "evaluating",
    "other": "between the steps",
}


def compose(
    suspects: list[Suspect], heard: dict[int, Heard], seen: dict[str, Any], *, config: WatchdogConfig, reporter: int
) -> dict[str, Any]:
    """`seen`: "stacks/RANK" and "examined/RANK" of the ranks that could be asked."""
    return {
        "time_s": time.time(),
        "frozen": [_frozen(s, heard[s.rank], seen) for s in suspects],
        "ranks": [_rank(rank, h, seen) for rank, h in sorted(heard.items())],
        "reported_by": reporter,
        "limits": dataclasses.asdict(config),
    }


def _frozen(suspect: Suspect, heard: Heard, seen: dict[str, Any]) -> dict[str, Any]:
    beat, examined = heard.beat, dict(seen.get(f"examined/{suspect.rank}", {}))
    own = seen.get(f"stacks/{suspect.rank}")
    threads: Any = None
    if own:
        threads, taken = own, "when it was found"
    elif beat is not None and examined.get("stacks"):
        threads, taken = by_thread(examined.pop("stacks"), beat.main_thread), "where it was frozen"
    stack = (threads or {}).pop(MAIN, None)
    if stack is None:
        stack, taken = (list(beat.stack) if beat else []), "when it was last heard of"
    if beat is not None and beat.phase == "start" and examined.get("phase") in ("other", "log"):
        del examined["phase"]  # a clock has no name for it
    return {
        "rank": suspect.rank,
        "host": beat.host if beat else None,
        "pid": beat.pid if beat else None,
        "phase": beat.phase if beat else None,
        "last_step": beat.step if beat else None,
        "why": suspect.why,
        "stack": stack,
        "stack_taken": taken,
        "other_threads": threads,
        **examined,
    }


def by_thread(lines: list[str], main_thread: int) -> dict[str, list[str]]:
    """`faulthandler`'s text: a head for each thread, with its number in hexadecimal, then its frames, innermost first."""
    threads: dict[str, list[str]] = {}
    name = "?"
    for line in lines:
        if "hread 0x" in line:
            ident = int(line.split("0x", 1)[1].split()[0], 16)
            name = MAIN if ident == main_thread else f"{ident:#x}"
            threads[name] = []
        elif line.strip():
            threads.setdefault(name, []).append(line.strip())
    return threads


def _rank(rank: int, heard: Heard, seen: dict[str, Any]) -> dict[str, Any]:
    if heard.beat is None:
        return {"rank": rank, "last_heard_s": None}
    hidden = ("machine", "dump", "number", "main_thread")
    facts = {k: v for k, v in dataclasses.asdict(heard.beat).items() if k not in hidden}
    return {**facts, "last_heard_s": heard.age_s, "stacks": seen.get(f"stacks/{rank}")}


def sentence(report: dict[str, Any], where: str) -> str:
    first, *others = report["frozen"]
    also = f" (and {len(others)} more)" if others else ""
    place = f"on {first['host']} (process {first['pid']}) " if first["host"] else ""
    state = f"; the process: {first['process']}" if "process" in first else ""
    doing = (
        f", in the phase {first['phase']!r} ({PHASES[first['phase']]}) after step {first['last_step']}" if place else ""
    )
    return f"rank {first['rank']}{also} {place}{first['why']}{doing}{state}; all ranks leave; stacks: {where}"


def write(report: dict[str, Any], out: str, *, limit_s: float) -> str:
    """Into the run's folder; where that does not take it in time (it may be why the run hangs), into a local file."""
    name = f"hang-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(report['time_s']))}.json"
    where, content = objects.join(out, name), json.dumps(report, indent=1).encode()
    is_written = threading.Event()

    def put() -> None:
        objects.write_bytes(where, content)
        is_written.set()

    threading.Thread(target=put, daemon=True).start()
    if is_written.wait(limit_s):
        return where
    path = places.private_folder("hangs") / name
    path.write_bytes(content)
    return f"{path} ({out} did not take the report)"
