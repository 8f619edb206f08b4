"""Run by test_watchdog.py and test_stop.py: runs of several ranks in which something happens to one of them at a named place.

Ranks are forked from this process, because importing what they need costs more than their steps. For each case of the list
that is given, one JSON object: the ranks' exit codes, their records, the reports of hangs and what was written to stderr.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.data.loading import batches
from pipeline.distributed import leave
from pipeline.engine import deepspeed_engine
from pipeline.supervision import attempt_store, fault_points
from pipeline.training import evaluate, trainer
from pipeline.training.run import load_yaml
from pipeline.training.train import train

ENOUGH_S = 300.0  # a starved machine counts standing still more slowly
"""The others have long left by then, or never will; collectives give up after 600 s."""
WHERE_SIGNAL = signal.SIGUSR2


def happen(event: dict[str, Any], folder: Path) -> None:
    """What an event does, on the thread and at the place where it comes up."""
    (folder / "reached").touch()
    match event["do"]:
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "stall":
            time.sleep(1e6)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "fail":
            raise ValueError("this rank fails alone")


def arm(event: dict[str, Any], folder: Path) -> None:
    """Let the event happen when its place is reached for the `call`-th time."""
    calls = [0]

    def reached() -> None:
        calls[0] += 1
        if calls[0] == event.get("call", 1):
            happen(event, folder)

    def before(owner: Any, name: str, applies: Any = lambda *a: True) -> None:
        original = getattr(owner, name)

        def patched(*arguments: Any, **named: Any) -> Any:
            if applies(*arguments):
                reached()
            return original(*arguments, **named)

        setattr(owner, name, patched)

    match event["at"]:
        case "forward":
            before(deepspeed_engine.Objective, "forward", lambda *a: len(a) == 3)
        case "loader":
            before(batches.BatchStream, "_batch", lambda stream, _: stream._pixels._seed is not None)
        case "evaluation data":
            before(batches.BatchStream, "_batch", lambda stream, _: stream._pixels._seed is None)
        case "evaluation":
            before(evaluate, "_numbers")
        case "start":
            before(trainer, "build_model")
        case "record":
            pass
        case point:
            fault_points.hook = lambda passed: reached() if passed == point else None


def rank_main(case: dict[str, Any], rank: int) -> int:
    folder = Path(case["folder"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for event in case["events"]:
        if event["rank"] == rank:
            arm(event, folder)
    if rank == case.get("mute"):  # its watchdog never reaches the store
        attempt_store.connect = lambda _: threading.Event().wait()  # type: ignore[assignment, return-value]
    run = load_yaml(Path(case["recipe"]).read_text(), "recipe")
    last = None
    with (folder / f"records.{rank}").open("a") as log:
        for record in train(run, str(folder / "run")):
            last = record
            log.write(json.dumps(record.as_dict()) + "\n")
            log.flush()
            for event in case["events"]:
                if event["at"] == "record" and event["rank"] == rank and event["call"] == record.step:
                    happen(event, folder)
    leave()
    return 75 if type(last).__name__ == "Stopped" else 0


def fork(case: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            os.dup2(os.open(f"{case['folder']}/stderr.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            faulthandler.register(WHERE_SIGNAL, file=2, all_threads=True)
            code = rank_main(case, rank)
        except Exception as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return pid


def fork_store() -> tuple[int, int]:
    """The launcher's store in a process of its own: (pid, port). This process keeps one thread, or what it forks might begin
    with a lock that another one held."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, f"{store.port}\n".encode())
        signal.alarm(3600)  # should nobody end it
        signal.pause()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        return pid, int(answer.readline())


def signal_when_reached(case: dict[str, Any], pids: list[int]) -> None:
    """`signal`: the rank that is told to stop when the place of an event was reached, so that it is another's event."""
    while not Path(case["folder"], "reached").exists():
        time.sleep(0.05)
    time.sleep(case.get("after_s", 0.5))
    os.kill(pids[case["signal"]], signal.SIGTERM)


def run_case(case: dict[str, Any], number: int) -> dict[str, Any]:
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reached").unlink(missing_ok=True)
    size = case.get("ranks", 2)
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": str(number)}
    store = None
    if case.get("has_launcher", True):
        store, port = fork_store()
    else:  # the store is rank 0's
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": str(store is not None), "MASTER_PORT": str(port)}
    pids = [fork(case, rank) for rank in range(size)]
    if "signal" in case:
        threading.Thread(target=signal_when_reached, args=(case, pids), daemon=True).start()
    codes: list[int | None] = [None] * size
    deadline_s = time.monotonic() + case.get("enough_s", ENOUGH_S)
    while None in codes and time.monotonic() < deadline_s:
        for rank, pid in enumerate(pids):
            if codes[rank] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.05)
    for rank, pid in enumerate(pids):
        if codes[rank] is None:
            os.kill(pid, WHERE_SIGNAL)  # a rank that should have left says where it stands
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if store is not None:
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)
    return {
        "codes": codes,
        "records": [
            [json.loads(line) for line in (folder / f"records.{r}").read_text().splitlines()] for r in range(size)
        ],
        "reports": [json.loads(p.read_text()) for p in sorted((folder / "run").glob("hang-*.json"))],
        "stderr": [(folder / f"stderr.{r}").read_text() for r in range(size)],
    }


def main() -> None:
    torch.set_num_threads(1)
    deepspeed_engine._import_library()
    for number, case in enumerate(json.loads(sys.argv[1])):
        print(json.dumps(run_case(case, number)), flush=True)


if __name__ == "__main__":
    main()
