"""Sweeps in processes of their own, for the tests that kill, freeze, repeat and move them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transfer.protocol.method_settings import FinetuneSettings
from transfer.protocol.methods import Method
from transfer.protocol.tasks import Suite, TaskEntry
from transfer.sweep.cells import Sweep
from transfer.sweep.ledger import Ledger, SweepInfo
from transfer.sweep.sources import open_source

ROOT = Path(__file__).parents[2]
SUITE = """
name: small
tasks: [{card: digits, holdout_per_class: 2}]
num_seeds: 2
methods:
  ridge: {shots: [1, 200]}
  knn: {shots: [1], ks: [1, 2]}
  finetune: {shots: [1], learning_rates: [0.1, 0.3, 1.0e+30], num_steps: [6]}
"""

PROGRAM = """
import dataclasses, json, pathlib, sys
from orchestration.tune.ray_cluster import Resources
from orchestration.tune.ray_tune import transfer
def tell(event):
    event.get("entry", {}).pop("history", None)
    print(json.dumps(event), flush=True)
if __name__ == "__main__":
    checkpoint, suite, out, root, seeds, concurrent = sys.argv[1:]
    resources = Resources(**json.loads(pathlib.Path(__file__).with_name("resources.json").read_text()))
    result = transfer(checkpoint, suite, out, data_root=root, num_seeds=int(seeds), on_event=tell,
                      resources=dataclasses.replace(resources, max_concurrent=int(concurrent)))
    print(json.dumps({"event": "result", "num_run": result.num_run, "num_failed": result.num_failed,
                      "num_trials": result.num_trials, "not_run": result.not_run}))
"""


class Runner:
    """Sweeps in processes of their own, with temporary files of their own."""

    def __init__(
        self,
        checkpoint: Path | str,
        digits: str,
        folder: Path,
        *,
        suite: str = SUITE,
        program: str = PROGRAM,
        resources: dict[str, Any] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        """`resources`: fields of `orchestration.tune.ray_cluster.Resources`; `variables`: of the environment."""
        folder.mkdir(exist_ok=True)
        self.folder, self.out = folder, folder / "sweep"
        (folder / "suite.yaml").write_text(suite)
        (folder / "tmp").mkdir()
        (folder / "program.py").write_text(program)
        (folder / "resources.json").write_text(json.dumps(resources or {}))
        self.stands_in = folder
        """Working directory of the driver."""
        self._variables = variables or {}
        root = Path(digits).parent
        self._arguments = [str(checkpoint), str(folder / "suite.yaml"), str(self.out), str(root)]

    def start(self, num_seeds: int = 2, concurrent: int = 2) -> subprocess.Popen[str]:
        # Ray's sockets need a short path; everything else shows what it leaves behind.
        environment = {**os.environ, "TMPDIR": str(self.folder / "tmp"), "RAY_TMPDIR": "/tmp", "WORLD_SIZE": "7"}
        environment |= {"PYTHONPATH": str(ROOT), **self._variables}
        command = [sys.executable, str(self.folder / "program.py"), *self._arguments]
        command += [str(num_seeds), str(concurrent)]
        return subprocess.Popen(
            command, env=environment, cwd=self.stands_in, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, num_seeds: int = 2, concurrent: int = 2) -> list[dict[str, Any]]:
        process = self.start(num_seeds, concurrent)
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err[-3000:]
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    def table(self) -> dict[str, Any]:
        """What must not depend on how the sweep went."""
        rows = {}
        for e in Ledger(str(self.out)).entries():
            rows[e.digest] = (e.kind, e.method, e.value, e.stopped_at, e.status, e.metrics, e.grid, e.hyperparameters)
        return rows

    def files(self) -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (self.out / "trials").glob("*.json")}


SETTINGS = FinetuneSettings(shots=(1, 5), learning_rates=(0.1, 0.4), num_steps=(6,), batch=16)


def sweep_in(out: Path, digits: str, checkpoint: str, **changes: Any) -> Sweep:
    """Claimed, as ranks read it from its folder."""
    entry = TaskEntry(card="digits", holdout_per_class=3)
    methods = (Method(name="finetune", kind="finetune", settings=SETTINGS),)
    suite = Suite(name="s", title="s", tasks=(entry,), methods=methods, num_seeds=1)
    source = open_source(checkpoint)
    sweep = Sweep(out=str(out), data_root=str(Path(digits).parent), sources=(source,), suite=suite, **changes)
    facts: dict[str, Any] = dict.fromkeys(
        ("suite", "suite_digest", "checkpoint_url", "checkpoint_digest", "model", "command", "hardware"), ""
    )
    Ledger(sweep.out).claim(SweepInfo(**facts, started_s=1.0, num_seeds=1, not_run=[], plan=sweep.plain()))
    return sweep
